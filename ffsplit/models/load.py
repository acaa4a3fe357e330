"""Loading dense and compressed models through transformers, quietly."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ffsplit.compat.transformers import (
    fill,
    has_joint_processor,
    names_read,
    pictures_alone,
    replace_quantized,
)
from ffsplit.errors import ConfigError, UnsupportedModelError, explained
from ffsplit.models.checkpoint import Checkpoint, tokenizer_files
from ffsplit.models.inputs import CLASSIFIERS, GENERATORS, needed_arguments, unreadable
from ffsplit.models.load_options import (
    attention_advice,
    attention_options,
    check_trusted,
    remote_classes,
    trusted,
    trusting,
)
from ffsplit.models.names import base_of, below_base
from ffsplit.models.not_a_model import check_tokenizer_library
from ffsplit.models.tensor_files import opened, read_json

# Text classifiers: logits for whole rows.


def classifies(model: Any) -> bool:
    """Whether a loaded model returns logits for a whole row."""
    return type(model).__name__.endswith(CLASSIFIERS)


def may_search(checkpoint: Checkpoint) -> bool:
    """Whether `allocation: auto` searches.

    It does if layers matter unevenly (classifiers, causal language models) and their widths may differ (no
    experts).
    """
    is_uneven = checkpoint.classifies or checkpoint.compared_as == "next_tokens"
    return is_uneven and checkpoint.reads_single_texts and not checkpoint.has_experts


def row_logits(model: Any, arguments: Mapping[str, Tensor]) -> Tensor:
    """Logits [rows, labels] in float64, minus each row's mean, which changes no label.

    A single label is a score and stays whole. If the model's config names no padding token, rows run one at
    a time, because the head may need that token to find where a row ends.
    """
    logits = _logits(model, arguments).double()
    return logits if logits.shape[-1] == 1 else logits - logits.mean(-1, keepdim=True)


def _logits(model: Any, arguments: Mapping[str, Tensor]) -> Tensor:
    if "input_ids" not in arguments or getattr(model.config, "pad_token_id", None) is not None:
        logits: Tensor = model(**arguments).logits
        return logits
    rows = []
    for ids_T, mask_T in zip(arguments["input_ids"], arguments["attention_mask"].bool(), strict=True):
        ids_1T = ids_T[mask_T][None]
        rows.append(model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits)
    return torch.cat(rows)


POOLER = "pooler"
"""transformers initialises it at random if the checkpoint lacks it; hidden states do not depend on it."""
TRAINED_WITH = "masked_spec_embed"
"""Speech models replace masked frames by it, in training only."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars and log only errors while a model that was checked is loaded."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_base_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model without its task head, in eval mode.

    A model that lacks one of its family's towers is loaded as the class it was saved from, because
    transformers' base class would initialise the missing tower at random. So is one of a family that the
    table lacks, whose FFNs were found in that class.
    """
    is_usual = checkpoint.is_whole and not checkpoint.is_guessed
    class_name = "" if is_usual else checkpoint.class_name
    model = load_whole_model(checkpoint.directory, class_name, dtype=dtype)
    model = base_of(model)
    _see_whole_rows(model)
    forget_caches(model)
    return model.to(device)


def forget_caches(model: Any) -> None:
    """Let forward passes return no cache of keys and values: only generation reads one."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise ConfigError when a tensor of the model is missing, or its shape contradicts the config.

    transformers would initialise such a tensor at random. No weights are read. The check covers the class
    that the config names, without the head if the checkpoint has none. A base model's pooler may be missing,
    and so may tensors that a family's code can initialise without harm. Also checks names (`check_names`).
    """
    where = checkpoint.directory
    chosen = model_class("" if checkpoint.is_headless else checkpoint.class_name, where=where)
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": trusted(),
        **attention_options(),
    }
    options |= {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _loading(where), quiet_transformers():
        load_config(where)  # so that an invalid config is reported as such
        model, found = chosen.from_pretrained(where, **options)
    is_base = checkpoint.is_headless or checkpoint.class_name.endswith("Model") or not checkpoint.class_name
    absent = sorted(name for name in found["missing_keys"] if not is_made_up(name, of_base=is_base))
    if absent:
        raise ConfigError(f"{where} holds no tensor for {absent[0]}")
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"{where}: {name} has the shape {tuple(shape)}, config.json implies {tuple(expected)}"
        )
    check_names(checkpoint, model)


def is_made_up(name: str, *, of_base: bool) -> bool:
    """Whether transformers may initialise a tensor at random, because nothing computed here depends on it."""
    return TRAINED_WITH in name or (of_base and POOLER in name)


def check_names(checkpoint: Checkpoint, model: Any) -> None:
    """Raise UnsupportedModelError when transformers loads a block's tensor elsewhere than the headers imply.

    Otherwise the compressed tensors would not be the ones that transformers runs.
    """
    read = names_read(model, checkpoint.tensors)
    for module, stored in checkpoint.names.modules.items():
        if stored not in checkpoint.names_in_blocks:
            continue
        found = read[stored]
        expected = module.removeprefix(checkpoint.prefix)
        is_ffn = stored in checkpoint.ffn_names
        if found is None and not is_ffn:
            continue  # such as masks and frequencies that older code stored
        if found is None or (found.is_whole and below_base(model, found.name) != expected):
            as_what = "ignores it" if found is None else f"reads it as {found.name}, not as {expected}"
            raise UnsupportedModelError(
                f"{checkpoint.directory}: {stored} would be compressed, but transformers {as_what}: "
                f"load the model as {type(model).__name__} and save it with save_pretrained"
            )


def _see_whole_rows(model: Any) -> None:
    """Turn off chunked FFNs: the result is the same, and hooks see whole rows."""
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0


def load_whole_model(directory: Path, class_name: str, **options: Any) -> Any:
    """The model as the class it was saved from, in eval mode; options go to from_pretrained."""
    return load_with_missing(directory, class_name, **options)[0]


def load_with_missing(directory: Path, class_name: str, **options: Any) -> tuple[Any, frozenset[str]]:
    """The same model, and the names of its tensors that the files lack: transformers made them up."""
    with trusting(bool(options.pop("trust_remote_code", False))), quiet_transformers():
        check_trusted(directory)
        chosen = model_class(class_name, where=directory)
        options |= {"local_files_only": True, "use_safetensors": True, "trust_remote_code": trusted()}
        with _loading(directory):
            options = attention_options() | options | {"output_loading_info": True}
            model, found = chosen.from_pretrained(directory, **options)
            return model.eval(), frozenset(found["missing_keys"])


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    """At the boundary to transformers: turn whatever it raises into a one-line ConfigError."""
    config = read_json(directory / "config.json", f"{directory} is not a model: it has no config.json")
    with explained(f"{directory} does not load", advice=attention_advice(config)):
        yield


def decodes(model: Any) -> bool:
    """Whether a loaded model is a decoder that continues a text, token by token."""
    return type(model).__name__.endswith(GENERATORS) and not model.config.is_encoder_decoder


def model_class(class_name: str, *, where: Path) -> Any:
    """The transformers class of this name, AutoModel for ""; for a model's own class, its Auto class.

    Raises ConfigError when there is no such class, or its module cannot be imported.
    """
    import transformers

    check_model_class(class_name, where=where)
    name = _auto_class(class_name, where) or class_name or "AutoModel"
    with explained(f"{where}: transformers' {name} cannot be imported"):
        return getattr(transformers, name)


def _auto_class(class_name: str, where: Path) -> str | None:
    """The Auto class for a class of the model's own code; for "" its first one, unless AutoModel will do."""
    classes = {auto: target for auto, target in remote_classes(where).items() if auto.startswith("AutoModel")}
    named = [auto for auto, target in classes.items() if target.rpartition(".")[2] == class_name]
    if class_name or not classes or "AutoModel" in classes:
        return next(iter(named), None)
    return next(iter(classes))


def empty_model(checkpoint: Checkpoint, *, class_name: str | None, dtype: torch.dtype) -> Any:
    """The model without its weights, in eval mode: the base model, or the class that is named.

    Parameters are on the meta device. Buffers that checkpoints do not store have their real values.
    """
    from accelerate import init_empty_weights

    with (
        quiet_transformers(),
        _loading(checkpoint.directory),
        init_empty_weights(include_buffers=False),
    ):
        config = load_config(checkpoint.directory)
        model = _make(model_class(class_name or "", where=checkpoint.directory), config, dtype=dtype)
        stored = getattr(config, "quantization_config", None)
        if stored is not None:  # a split checkpoint: its FFNs replace the dense ones
            with _default_dtype(dtype):
                replace_quantized(model, stored)
    _see_whole_rows(model)
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_tensors(
    model: Any, checkpoint: Checkpoint, names: Sequence[str], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Fill part of an empty model with some of a checkpoint's tensors, as from_pretrained does."""
    with ExitStack() as stack, quiet_transformers(), _loading(checkpoint.directory):
        files: dict[str, Any] = {}
        for file in sorted({checkpoint.tensors[name].file for name in names}):
            files[file] = stack.enter_context(opened(checkpoint.directory / file, "pt"))
        slices = {name: files[checkpoint.tensors[name].file].get_slice(name) for name in names}
        fill(model, slices, device=device, dtype=dtype)


def check_model_class(class_name: str, *, where: Path) -> None:
    """Raise ConfigError when neither transformers nor the model's own code has a class. Imports nothing."""
    import transformers

    if class_name and class_name not in transformers.__all__ and _auto_class(class_name, where) is None:
        raise ConfigError(f"{where}: transformers {transformers.__version__} has no class {class_name}")


def random_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Any:
    """A model of the checkpoint's class and shape with random weights, in eval mode."""
    with quiet_transformers(), _loading(checkpoint.directory):
        chosen = model_class(checkpoint.class_name, where=checkpoint.directory)
        model = _make(chosen, load_config(checkpoint.directory))
    return model.to(dtype).eval()


def load_processor(checkpoint: Checkpoint, medium: Literal["image", "sound"]) -> Any:
    """The processor that turns pictures or sounds into inputs. Raises ConfigError when there is none."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    options: dict[str, Any] = {"backend": "pil"} if medium == "image" else {}
    chosen = AutoImageProcessor if medium == "image" else AutoFeatureExtractor
    with quiet_transformers(), explained(f"{checkpoint.directory} has no {medium} processor that loads"):
        return chosen.from_pretrained(checkpoint.directory, local_files_only=True, **options)


def load_joint_processor(checkpoint: Checkpoint) -> Any | None:
    """The processor that turns texts together with pictures or sounds into inputs; None if it has none.

    Raises ConfigError when it does not load.
    """
    from transformers import AutoProcessor, ProcessorMixin

    with (
        quiet_transformers(),
        pictures_alone(),
        explained(f"{checkpoint.directory} has no processor that loads"),
    ):
        if not has_joint_processor(checkpoint.directory, checkpoint.architecture.model_type):
            return None
        found = AutoProcessor.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=trusted()
        )
    return found if isinstance(found, ProcessorMixin) else None


def forward_arguments(checkpoint: Checkpoint) -> Mapping[str, inspect.Parameter]:
    """The arguments of the forward of a checkpoint's class; none for a class of the model's own code.

    What a class hands on to its base model unnamed is among them.
    """
    import transformers

    if remote_classes(checkpoint.directory):
        return {}
    base = transformers.MODEL_MAPPING.get(type(load_config(checkpoint.directory)), None)
    base = base[0] if isinstance(base, tuple) else base
    chosen = model_class(checkpoint.class_name, where=checkpoint.directory)
    chosen = base if chosen is transformers.AutoModel else chosen
    found = dict(inspect.signature(chosen.forward).parameters)
    if base is not None and any(each.kind == each.VAR_KEYWORD for each in found.values()):
        handed_on = inspect.signature(base.forward).parameters
        found |= {name: each for name, each in handed_on.items() if name not in found}
    return found


def check_arguments(checkpoint: Checkpoint, given: Collection[str]) -> None:
    """Raise UnsupportedModelError if a model needs arguments that its rows do not give.

    Such a model is most often a part of another, which makes the arguments.
    """
    needed = needed_arguments(forward_arguments(checkpoint))
    missing = [name for name in needed if name not in given]
    if missing:
        raise unreadable(load_config(checkpoint.directory), missing)


def _make(chosen: Any, config: Any, **options: Any) -> Any:
    """Build a model of a class, or of the class that an Auto class finds."""
    options |= attention_options()
    if hasattr(chosen, "_from_config"):
        return chosen._from_config(config, **options)
    return chosen.from_config(config, trust_remote_code=trusted(), **options)


def load_config(directory: Path) -> Any:
    """A model's config, as transformers reads it."""
    from transformers import AutoConfig

    check_trusted(directory)
    with explained(f"{directory}/config.json is invalid"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted())


def _config_of_tokenizer(directory: Path) -> Any:
    """The config by which to find a tokenizer's class; None for the model's own.

    If tokenizer_config.json names the class, only the model type is needed. Then the family's modules need
    not be imported, which would take as long as everything else.
    """
    from transformers import PreTrainedConfig

    path = directory / "tokenizer_config.json"
    stated = read_json(path, "") if path.is_file() else {}
    if stated.get("tokenizer_class") and not remote_classes(directory):
        with suppress(Exception):  # fields that only the family's own config accepts
            return PreTrainedConfig.from_pretrained(directory, local_files_only=True)
    load_config(directory)  # so that an invalid config is reported as such
    return None


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises ConfigError when it has none that works."""
    return tokenizer_in(checkpoint.directory)


def tokenizer_in(directory: Path) -> Any:
    """The tokenizer in a directory, such as an artifact's. Raises ConfigError when it has none that works."""
    from transformers import AutoTokenizer

    if not tokenizer_files(directory):  # transformers would create an empty one
        raise ConfigError(f"{directory} has no tokenizer: put its tokenizer.json beside the model")
    check_tokenizer_library(directory)
    with quiet_transformers():
        config = _config_of_tokenizer(directory)
        with explained(f"{directory} has no tokenizer that loads"):
            return AutoTokenizer.from_pretrained(
                directory,
                config=config,
                local_files_only=True,
                trust_remote_code=trusted(),
            )
