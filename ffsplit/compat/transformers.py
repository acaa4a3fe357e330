"""Private interfaces of transformers: how it renames, joins and loads tensors. Known for 5.0 to 5.23."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch


class ReadTensor(NamedTuple):
    """How a model reads a stored tensor."""

    name: str
    """The model's own tensor; the first, if one stored tensor holds several."""
    renamed: str
    """The stored name after renaming, before tensors are joined or split, with its stored prefix."""
    is_whole: bool
    """Whether the tensor is stored as the model has it, neither joined with others nor split."""


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
        found[name] = ReadTensor(target, renamed, is_whole=source is None)
        if source is None:
            whole.add(target)
    return found


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


def is_stack_of_experts(module: Any) -> bool:
    """Whether a module runs a block's experts in the usual way: `forward(states, top_k_index, weights)`.

    That is what `transformers.integrations.moe.use_experts_implementation` marks, where it stacks matrices
    [out, in] without biases, gate before up, activates as its default does, and normalises nothing.
    """
    from transformers.integrations import moe

    if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated")):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    return (
        gate is moe._default_apply_gate
        and module.is_concatenated
        and not (module.is_transposed or module.has_bias or module.has_post_expert_norm)
        and hasattr(module, "down_proj")
        and hasattr(module, "gate_up_proj" if module.has_gate else "up_proj")
    )


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
