"""Private interfaces of transformers: how it renames, joins and loads tensors, and finds processors.

Known for 5.0 to 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch


class ReadTensor(NamedTuple):
    """How a model reads a stored tensor."""

    name: str
    """The model's own tensor; the first, if one stored tensor holds several."""
    renamed: str
    """The stored name after renaming, before tensors are joined or split, with its stored prefix.

    Experts that the model stacks have the names of their places there: experts.3.gate_proj.weight.
    """
    is_whole: bool
    """Whether the tensor is stored as the model has it, neither joined with others nor split."""
    rows_of: tuple[str, ...] = ()
    """The model's tensors that share its rows in equal parts, if it is split into several."""
    part: int | None = None
    """Which part of the model's tensor its rows are, if several are joined."""
    interleaved: bool = False
    """Whether rows that the model has one half after the other are stored by turns."""


def names_read(model: Any, stored: Iterable[str]) -> dict[str, ReadTensor | None]:
    """How transformers reads each stored name when it loads a model of this class; None: it ignores it.

    The same steps as in `transformers.core_model_loading.convert_and_load_state_dict_in_model` of version
    5.23: renamings, then one converter, then the base model's prefix.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    tensors, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, ReadTensor | None] = {}
    whole: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, [])
        target, source = rename_source_key(name, renamings, converters, prefix, tensors)
        if target not in tensors and name in tensors:
            renamed = name
            target, source = rename_source_key(name, [], [], prefix, tensors)
        if target not in tensors or (source is None and target in whole):
            found[name] = None
            continue
        read = found[name] = ReadTensor(target, renamed, is_whole=source is None)
        if source is None:
            whole.add(target)
            continue
        converter = next(each for each in converters if source in each.source_patterns)
        found[name] = _converted(read, converter, source, tensors[target].shape)
    return found


def _converted(read: ReadTensor, converter: Any, source: str, shape: Sequence[int]) -> ReadTensor:
    """How a model reads a tensor that a converter joins with others, splits, or reorders.

    `source` is the converter's pattern of its name, `shape` that of the model's tensor.
    """
    from transformers.core_model_loading import Chunk, Concatenate

    is_bias = read.name.endswith("bias")
    rows = len(shape) - (1 if is_bias else 2)  # the dimension of the outputs
    operations = [each for each in converter.operations if not _interleaves(each, rows)]
    kinds = [type(each) for each in operations if getattr(each, "dim", None) == rows]
    read = read._replace(interleaved=len(operations) < len(converter.operations))
    first, *others = converter.target_patterns
    if kinds == [Chunk] and len(operations) == 1:
        return read._replace(rows_of=(read.name, *(read.name.replace(first, other) for other in others)))
    if kinds == [Concatenate] and len(operations) == 1:
        return read._replace(part=converter.source_patterns.index(source))
    if read.interleaved and not operations:
        return read._replace(renamed=re.sub(source, first, read.renamed))
    if "*" in source:
        return read._replace(renamed=_of_expert(read.renamed, converter, source, shape[0]))
    return read


def _interleaves(operation: Any, dimension: int) -> bool:
    """Whether an operation undoes that rows of two halves are stored by turns."""
    is_one = type(operation).__name__ == "Interleave" and not operation.inverse
    return is_one and operation.dim == dimension


def _of_expert(renamed: str, converter: Any, source: str, num_experts: int) -> str:
    """The name of a matrix by its place in a stack, from the name by which files keep it.

    Several stacks of `num_experts` each may be numbered through: ERNIE's for text, then those for pictures.
    """
    stored = re.search(source.replace(".*.", r"\.(\d+)\."), renamed)
    if stored is None:
        return renamed
    stack, expert = divmod(int(stored[1]), num_experts)
    targets = converter.target_patterns
    path, _, name = targets[stack].rpartition(".") if stack < len(targets) else ("", "", "")
    roles = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    if len(roles) != len(converter.source_patterns):
        return renamed
    role = roles[converter.source_patterns.index(source)]
    return f"{renamed[: stored.start()]}{path}.{expert}.{role}.weight"


def fill(model: Any, tensors: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill part of an empty model with stored tensors, renamed, joined and cast as from_pretrained does.

    `tensors` may be slices of open safetensors files: each is read only when needed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    convert_and_load_state_dict_in_model(model=model, state_dict=tensors, load_config=settings)


def replace_quantized(model: Any, settings: Any) -> None:
    """Put the modules that a `quantization_config` asks for into an empty model."""
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(settings, pre_quantized=True).preprocess_model(model=model)


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


class StackedExperts(NamedTuple):
    """How a module that runs a block's experts keeps their matrices, one tensor for each kind."""

    is_gated: bool
    is_transposed: bool
    """[in, out] rather than [out, in]."""
    is_interleaved: bool
    """Rows of gate and up by turns, rather than one after the other."""
    has_norm: bool
    """Whether each expert's output is normalized."""


def stacked_experts(module: Any) -> StackedExperts | None:
    """How a module stacks a block's experts; None if it does not run them in the usual way.

    The usual way is `forward(states [T, D], top_k_index [T, k], weights [T, k])`, which
    `transformers.integrations.moe.use_experts_implementation` marks.
    """
    if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated")):
        return None
    names = ("down_proj", "gate_up_proj" if module.has_gate else "up_proj")
    if not all(hasattr(module, name) for name in names):
        return None
    has_norm = bool(getattr(module, "has_post_expert_norm", False))
    return StackedExperts(module.has_gate, module.is_transposed, not module.is_concatenated, has_norm)


def activation_of(module: Any) -> str | None:
    """The name by which configs call an activation module; None if a module is none."""
    import torch
    from transformers.activations import ACT2CLS

    if isinstance(module, torch.nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    for name, found in ACT2CLS.items():
        if type(module) is (found[0] if isinstance(found, tuple) else found):
            return str(name)
    return None


def has_joint_processor(directory: Path, model_type: str) -> bool:
    """Whether a folder, or its model's family, has a processor of more than one kind of input."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return (directory / "processor_config.json").is_file() or model_type in PROCESSOR_MAPPING_NAMES


@contextmanager
def pictures_alone() -> Iterator[None]:
    """Load joint processors without their part for videos, in this context, if torchvision is missing.

    transformers loads that part always, and it needs torchvision even if no video is ever read.
    """
    if find_spec("torchvision") is not None:
        yield
        return
    from transformers import ImageProcessingMixin, processing_utils

    class NoVideos(ImageProcessingMixin):  # type: ignore[misc]
        """Stands in for the part for videos, which is never called."""

        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> NoVideos:
            return cls()

    module: Any = import_module("transformers.models.auto.video_processing_auto")
    base_classes = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING
    before = module.AutoVideoProcessor, base_classes["video_processor"]
    module.AutoVideoProcessor, base_classes["video_processor"] = NoVideos, "ImageProcessingMixin"
    try:
        yield
    finally:
        module.AutoVideoProcessor, base_classes["video_processor"] = before


def has_static_cache(model: Any) -> bool:
    """Whether keys and values may be kept in tensors of the full length from the start (5.16 to 5.23)."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def auto_class_of(class_name: str, *, model_type: str) -> str | None:
    """The Auto class that loads a model of this type as this class; None if none does.

    Of several, the first of the usual ones, then any other; those for several tasks come last.
    """
    from transformers.models.auto import modeling_auto

    usual = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    several = ("AutoModelForPreTraining", "AutoModelForMultimodalLM", "AutoModelForTextEncoding")
    names: list[str] = [name for name in vars(modeling_auto) if name.startswith("AutoModel")]
    others = sorted((name for name in names if name not in usual), key=several.__contains__)
    for name in (*usual, *others):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        listed = getattr(mapping, "_model_mapping", {}).get(model_type, ())
        if class_name == listed or class_name in (listed if isinstance(listed, tuple | list) else ()):
            return name
    return None
