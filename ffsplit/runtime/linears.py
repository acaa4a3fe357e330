"""The other linear layers of the blocks, those of attention, with int8 weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ffsplit.artifacts.manifest import LinearsRecord
from ffsplit.errors import ArtifactError, UnsupportedModelError
from ffsplit.ffn import Integer
from ffsplit.models.checkpoint import FFN_DTYPES, Checkpoint
from ffsplit.models.headers import opened
from ffsplit.quantization import quantize_rows, scales_of
from ffsplit.runtime.integer_map import IntegerMap

FORMAT = Integer(num_bits=8)
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def attention_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The linear layers of attention that every block has, as paths below a block.

    Raises UnsupportedModelError where there are none.
    """
    width = checkpoint.ffn_shape(0).hidden_size
    per_block = [_matrices(checkpoint, layer, width) for layer in range(checkpoint.num_layers)]
    found = tuple(path for path in per_block[0] if all(path in others for others in per_block))
    if not found:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: no linear layers of attention are known in a "
            f"{checkpoint.architecture.model_type}: take a recipe without `linears`"
        )
    return found


def _matrices(checkpoint: Checkpoint, layer: int, width: int) -> list[str]:
    base = f"{checkpoint.prefix}{checkpoint.block(layer)}."
    names = (name for name in checkpoint.tensors if name.startswith(base) and name.endswith(".weight"))
    return [
        name.removeprefix(base).removesuffix(".weight")
        for name in sorted(names)
        if ATTENTION.search(name.removeprefix(base))
        and len(checkpoint.tensors[name].shape) == 2
        and width in checkpoint.tensors[name].shape
        and checkpoint.tensors[name].dtype in FFN_DTYPES
    ]


def quantize_linears(checkpoint: Checkpoint, folder: Path) -> tuple[list[Path], LinearsRecord]:
    """One safetensors file a block with its attention's weights as integers, and what they come to."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = attention_linears(checkpoint)
    files, elements, size, before = [], 0, 0, 0
    for layer in range(checkpoint.num_layers):
        tensors = {}
        for path in modules:
            name = f"{checkpoint.prefix}{checkpoint.block(layer)}.{path}.weight"
            info = checkpoint.tensors[name]
            with opened(checkpoint.directory / info.file, "pt") as file:
                weight = file.get_tensor(name).float()
            scale = scales_of(weight, num_bits=8, group_size=None)
            integers = quantize_rows(weight, scale, num_bits=8, group_size=None)
            tensors[name] = integers["weight"]
            tensors[f"{name}_scale"] = integers["weight_scale"]
            elements, before = elements + info.num_elements, before + info.size_bytes
            size += FORMAT.size_bytes(info.shape[0], info.shape[1], itemsize=1)
        files.append(folder / f"linears-{layer:03d}.safetensors")
        save_file(tensors, files[-1], {"format": "pt"})
    record = LinearsRecord(
        modules=modules, num_bits=8, num_elements=elements, size_bytes=size, original_size_bytes=before
    )
    return files, record


def linears_config(modules: tuple[str, ...]) -> dict[str, Any]:
    """What `config.json` says of them."""
    return {"format": FORMAT.model_dump(mode="json"), "modules": list(modules)}


def install_linears(block: nn.Module, config: dict[str, Any], *, per_token: bool) -> None:
    """Put empty integer maps in the place of a block's linear layers."""
    format = Integer.model_validate(config["format"])
    for path in config["modules"]:
        old = block.get_submodule(path)
        if not isinstance(old, nn.Linear):
            raise ArtifactError(f"config.json names {path}, which is no linear layer in this model")
        with torch.device(old.weight.device):
            new = IntegerMap(
                format, old.out_features, old.in_features, bias=old.bias is not None, per_token=per_token
            )
        block.set_submodule(path, new)
