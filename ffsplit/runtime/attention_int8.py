"""The linear layers of attention, with int8 weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ffsplit.errors import ArtifactError, UnsupportedModelError
from ffsplit.ffn.quantization import joined, quantize_rows, scales_of
from ffsplit.ffn.shapes import Integer
from ffsplit.models.checkpoint import FFN_DTYPES, Checkpoint
from ffsplit.models.tensor_files import opened
from ffsplit.runtime.quantized_linear import QuantizedLinear, share_inputs
from ffsplit.store.manifest import LinearsRecord

FORMAT = Integer(num_bits=8)
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def attention_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The linear layers of attention in every block, as module paths below the base model.

    Raises UnsupportedModelError if there are none, or if they are stored transposed.
    """
    if any(ffn.paths.transposed for ffn in checkpoint.ffns):
        raise UnsupportedModelError(
            f"{checkpoint.directory}: a {checkpoint.architecture.model_type} stores its linear layers "
            "transposed: use a recipe without `linears`"
        )
    widths = {ffn.block: ffn.shape.hidden_size for ffn in checkpoint.ffns}
    found = tuple(path for block, width in widths.items() for path in _matrices(checkpoint, block, width))
    if not found:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: no linear layers of attention are known in a "
            f"{checkpoint.architecture.model_type}: use a recipe without `linears`"
        )
    return found


def _matrices(checkpoint: Checkpoint, block: str, width: int) -> list[str]:
    base = f"{checkpoint.prefix}{block}."
    names = {module: name for module, name in checkpoint.names.modules.items() if module.startswith(base)}
    return [
        f"{block}.{module.removeprefix(base).removesuffix('.weight')}"
        for module, name in sorted(names.items())
        if module.endswith(".weight")
        and name not in checkpoint.ffn_names
        and ATTENTION.search(module.removeprefix(base))
        and len(checkpoint.tensors[name].shape) == 2
        and width in checkpoint.tensors[name].shape
        and checkpoint.tensors[name].dtype in FFN_DTYPES
    ]


def quantize_linears(
    checkpoint: Checkpoint, folder: Path, *, original: Checkpoint
) -> tuple[list[Path], LinearsRecord]:
    """Safetensors files with attention's weights as integers, one per block, and a record of their sizes.

    The sizes before are those in `original`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = attention_linears(checkpoint)
    files, elements, size, before = [], 0, 0, 0
    for number, block in enumerate(checkpoint.blocks):
        tensors = {}
        for path in (path for path in modules if path.startswith(f"{block}.")):
            name = checkpoint.in_base(f"{path}.weight")
            info = checkpoint.tensors[name]
            with opened(checkpoint.directory / info.file, "pt") as file:
                weight = file.get_tensor(name).float()
            scale = scales_of(weight, num_bits=8, group_size=None)
            integers = quantize_rows(weight, scale, num_bits=8, group_size=None)
            tensors[name] = joined(integers)
            elements += info.num_elements
            before += original.tensors[name].size_bytes
            size += FORMAT.size_bytes(info.shape[0], info.shape[1], itemsize=1)
        files.append(folder / f"linears-{number:03d}.safetensors")
        save_file(tensors, files[-1], {"format": "pt"})
    record = LinearsRecord(
        modules=modules, num_bits=8, num_elements=elements, size_bytes=size, original_size_bytes=before
    )
    return files, record


def linears_config(modules: tuple[str, ...]) -> dict[str, Any]:
    """The entry for them in `config.json`."""
    return {"format": FORMAT.model_dump(mode="json"), "modules": list(modules)}


def install_linears(base: nn.Module, config: dict[str, Any]) -> None:
    """Replace linear layers of a base model by empty quantized ones, on the model's device."""
    format = Integer.model_validate(config["format"])
    children: dict[str, list[str]] = {}
    for path in config["modules"]:
        parent, _, name = path.rpartition(".")
        children.setdefault(parent, []).append(name)
    with next(base.parameters()).device:
        for path, names in children.items():
            _replace(base.get_submodule(path), path, names, format)


def _replace(parent: nn.Module, path: str, names: list[str], format: Integer) -> None:
    linears = []
    for name in names:
        old = getattr(parent, name, None)
        if not isinstance(old, nn.Linear):
            raise ArtifactError(f"config.json names {path}.{name}, which is not a linear layer in this model")
        new = QuantizedLinear(format, old.out_features, old.in_features, bias=False)
        new.bias = old.bias
        setattr(parent, name, new)
        linears.append(new)
    share_inputs(linears)  # queries, keys and values have the same inputs
