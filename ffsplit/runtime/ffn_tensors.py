"""An FFN between a checkpoint's tensors and weights that can be run, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ffsplit.compressors.base import OutputNorm
from ffsplit.compressors.weights import FFNPart, FFNWeights, LinearMap, stacked
from ffsplit.ffn import Integer
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.headers import opened
from ffsplit.models.places import FFNPlace, MatrixPlace
from ffsplit.quantization import joined
from ffsplit.runtime.checkpoint_format import guarded


def load_ffn(checkpoint: Checkpoint, index: int, *, activation: Any, device: torch.device) -> FFNWeights:
    """One dense FFN in float32, read from its tensors alone."""
    ffn = checkpoint.ffns[index]

    def linear(place: MatrixPlace) -> LinearMap:
        bias = (
            None if place.bias is None else _half(_read_float(checkpoint, place.bias, device=device), place)
        )
        return LinearMap.dense(read_matrix(checkpoint, place, device=device), bias)

    down = linear(ffn.down)
    part = FFNPart(
        neurons=torch.arange(ffn.shape.num_neurons),
        up=linear(ffn.up),
        gate=None if ffn.gate is None else linear(ffn.gate),
        down=LinearMap.dense(down.weight),
    )
    return FFNWeights(heavy=part, light=None, down_bias=down.bias, activation=activation)


def read_matrix(checkpoint: Checkpoint, place: MatrixPlace, *, device: torch.device) -> Tensor:
    """One matrix [out, in] of an FFN in float32; of a stack of experts, nothing but its own is read."""
    weight = _read_float(checkpoint, place.name, device=device, expert=place.expert)
    return _half(weight.T.contiguous() if place.transposed else weight, place)


def _half(rows: Tensor, place: MatrixPlace) -> Tensor:
    return rows if place.half is None else rows.chunk(2)[place.half].contiguous()


def load_output_norm(checkpoint: Checkpoint, index: int, *, device: torch.device) -> OutputNorm | None:
    """The layer norm of x + FFN(x), in float32, where the family has one."""
    ffn = checkpoint.ffns[index]
    base = f"{checkpoint.prefix}{ffn.block}.{ffn.paths.output_norm}"
    if ffn.paths.output_norm is None or f"{base}.weight" not in checkpoint.tensors:
        return None
    weight, bias = (_read_float(checkpoint, f"{base}.{name}", device=device) for name in ("weight", "bias"))
    return OutputNorm(weight, bias, eps=float(checkpoint.config.get("layer_norm_eps", ffn.tower.norm_eps)))


def _read_float(
    checkpoint: Checkpoint, name: str, *, device: torch.device, expert: int | None = None
) -> Tensor:
    with opened(checkpoint.directory / checkpoint.tensors[name].file, "pt") as file:
        tensor: Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return tensor.to(device=device, dtype=torch.float32)


def layer_tensors(
    checkpoint: Checkpoint, index: int, weights: FFNWeights, *, plain: bool
) -> dict[str, Tensor]:
    """A compressed FFN's tensors under the names that the artifact gives them, in the original's dtype.

    Where there is a bias, its dtype says which: matrices that were healed to become integers are float32.
    """
    ffn = checkpoint.ffns[index]
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[
        checkpoint.tensors[ffn.down.bias or ffn.up.bias or ffn.down.name].dtype
    ]
    weights = weights.folded()
    if plain:
        tensors = _plain_tensors(ffn, weights)
    else:
        base = f"{checkpoint.prefix}{ffn.split_prefix}."
        tensors = {base + name: tensor for name, tensor in _split_tensors(weights)}
        if index in guarded(checkpoint.ffns):
            tensors[checkpoint.prefix + ffn.guard] = torch.zeros(1)
    return {
        name: (tensor.cpu() if tensor.dtype == torch.uint8 else tensor.to("cpu", dtype)).contiguous()
        for name, tensor in tensors.items()
    }


def _plain_tensors(ffn: FFNPlace, weights: FFNWeights) -> dict[str, Tensor]:
    """The tensors of an ordinary FFN as the original has them; experts of a stack get names of their own."""
    (part,) = weights.parts
    up, down = part.up, replace(part.down, bias=weights.down_bias)
    if part.gate is not None and ffn.paths.fused:
        fused = torch.cat([part.gate.weight, up.weight])
        both = None if up.bias is None or part.gate.bias is None else torch.cat([part.gate.bias, up.bias])
        pairs = [(ffn.up, LinearMap.dense(fused, both)), (ffn.down, down)]
    else:
        gate = [(ffn.gate, part.gate)] if ffn.gate is not None and part.gate is not None else []
        pairs = [(ffn.up, up), *gate, (ffn.down, down)]
    tensors = {}
    for place, linear in pairs:
        tensors[place.alone or place.name] = linear.weight.T if place.transposed else linear.weight
        if place.bias is not None and linear.bias is not None:
            tensors[place.bias] = linear.bias
    return tensors


def _split_tensors(weights: FFNWeights) -> Iterator[tuple[str, Tensor]]:
    for role, part in (("heavy", weights.heavy), ("light", weights.light)):
        if part is None:
            continue
        if part.gate is not None and part.layout.is_fused:
            maps = {"gate_up": stacked([part.gate, part.up]), "down": part.down}
        else:
            maps = {"up": part.up, "down": part.down}
            maps |= {} if part.gate is None else {"gate": part.gate}
        for path, linear in maps.items():
            stored = linear.tensors
            if isinstance(linear.format, Integer):
                stored = {"weight": joined(stored)}
            for name, tensor in stored.items():
                yield f"{role}.{path}.{name}", tensor
            if linear.bias is not None:
                yield f"{role}.{path}.bias", linear.bias
    if weights.down_bias is not None:
        yield "down_bias", weights.down_bias
