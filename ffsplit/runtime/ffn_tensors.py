"""FFNs in a checkpoint: what its config says of them, and their tensors as weights that can be run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.compressors.base import OutputNorm
from ffsplit.config import Record
from ffsplit.errors import UnsupportedModelError
from ffsplit.ffn.activations import Activation, activation_named
from ffsplit.ffn.quantization import joined
from ffsplit.ffn.shapes import FFNShape, Integer, LayerLayout
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap, stacked
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.ffns import FFNPlace, MatrixPlace
from ffsplit.models.tensor_files import FLOATS, TensorSpan, opened

FORMAT_VERSION = 1
"""`version` in `quantization_config`. docs/formats/checkpoint.md says what may change under one number."""


class FFNRun(Record):
    """FFNs one after the other that are alike: how many, what each was, and how each is stored."""

    count: int = Field(ge=1)
    shape: FFNShape
    layout: LayerLayout


def runs_of(layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape]) -> list[FFNRun]:
    """The FFNs of a model, those that are alike said once: a config is copied and printed at loading."""
    alike = groupby(zip(layouts, shapes, strict=True))
    return [FFNRun(count=len(list(ffns)), shape=shape, layout=layout) for (layout, shape), ffns in alike]


def guarded(places: Sequence[FFNPlace]) -> frozenset[int]:
    """The indices of the FFNs that have a guard: the first of each tower, which may be loaded alone.

    A guard is a tensor under the name of one of the original's weights, with a shape that cannot match. It
    makes a load without ffsplit fail, which would otherwise begin with random weights.
    """
    first = {place.tower.path: place.index for place in reversed(places)}
    return frozenset(first.values())


def load_activation(checkpoint: Checkpoint, index: int, *, device: torch.device) -> Activation:
    """The activation of one FFN, with its own parameters in float32 if it is trained."""
    stored = checkpoint.ffns[index].activation_tensors
    parameters = {name: _read_float(checkpoint, each, device=device) for name, each in stored.items()}
    return activation_named(checkpoint.activation_of(index), parameters)


def load_ffn(checkpoint: Checkpoint, index: int, *, activation: Any, device: torch.device) -> FFNWeights:
    """One dense FFN in float32. Only its own tensors are read."""
    ffn = checkpoint.ffns[index]

    def linear(place: MatrixPlace) -> LinearMap:
        bias = None
        if place.bias is not None:
            bias = _half(_read_float(checkpoint, place.bias, device=device, part=place), place)
        return LinearMap.dense(read_matrix(checkpoint, place, device=device), bias)

    down = linear(ffn.down)
    part = FFNPart(
        neurons=torch.arange(ffn.shape.num_neurons),
        up=linear(ffn.up),
        gate=None if ffn.gate is None else linear(ffn.gate),
        down=LinearMap.dense(down.weight),
        rows={
            name: _read_float(checkpoint, stored, device=device) for name, stored in ffn.row_tensors.items()
        },
    )
    return FFNWeights(heavy=part, light=None, down_bias=down.bias, activation=activation)


def read_matrix(checkpoint: Checkpoint, place: MatrixPlace, *, device: torch.device) -> Tensor:
    """One matrix [out, in] of an FFN in float32. From a stack of experts, only its own slice is read."""
    weight = _read_float(checkpoint, place.name, device=device, part=place)
    return _half(weight.T.contiguous() if place.transposed else weight, place)


def _half(rows: Tensor, place: MatrixPlace) -> Tensor:
    if place.half is None:
        return rows
    return (rows[place.half :: 2] if place.interleaved else rows.chunk(2)[place.half]).contiguous()


def joined_halves(gate: Tensor, up: Tensor, of_up: MatrixPlace) -> Tensor:
    """Gate and up as the one tensor that holds them, in rows."""
    pair = [gate, up] if of_up.half else [up, gate]
    return torch.stack(pair, dim=1).flatten(0, 1) if of_up.interleaved else torch.cat(pair)


def load_output_norm(checkpoint: Checkpoint, index: int, *, device: torch.device) -> OutputNorm | None:
    """The layer norm of x + FFN(x) in float32; None if the family has none.

    Raises UnsupportedModelError if the checkpoint lacks one of its tensors.
    """
    ffn = checkpoint.ffns[index]
    if ffn.paths.output_norm is None:
        return None
    norm = f"{ffn.block}.{ffn.paths.output_norm}"
    weight, bias = (
        _read_float(checkpoint, checkpoint.in_base(f"{norm}.{name}"), device=device)
        for name in ("weight", "bias")
    )
    return OutputNorm(weight, bias, eps=float(checkpoint.config.get("layer_norm_eps", ffn.tower.norm_eps)))


def _read_float(
    checkpoint: Checkpoint, name: str, *, device: torch.device, part: MatrixPlace | None = None
) -> Tensor:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise UnsupportedModelError(f"{checkpoint.directory} has no tensor {name}")
    with opened(checkpoint.directory / info.file, "pt") as file:
        tensor: Tensor
        if part is None or part.expert is None:
            tensor = file.get_tensor(name)
        elif part.flat:
            rows = info.shape[0] // part.flat
            tensor = file.get_slice(name)[part.expert * rows : (part.expert + 1) * rows]
        else:
            tensor = file.get_slice(name)[part.expert]
        return tensor.to(device=device, dtype=torch.float32)


def layer_tensors(
    checkpoint: Checkpoint, index: int, weights: FFNWeights, *, plain: bool
) -> dict[str, Tensor]:
    """A compressed FFN's tensors, under the names in the artifact of the FFN with this index.

    That is its own index, less the experts that are dropped before it in its block. Each tensor has the dtype
    of the original tensor that it replaces; dtypes may differ within an FFN.
    """
    ffn = checkpoint.ffns[index]
    weights = weights.folded()
    tensors: dict[str, Tensor] = {}
    if plain:
        for name, stored, tensor in _plain_tensors(ffn, weights):
            tensors[name] = tensor.to(_dtype(checkpoint, stored))
        for name in ffn.adapters:
            rows = _rows_of(checkpoint, ffn, name, neurons=weights.parts[0].neurons)
            tensors[name] = rows.to(_dtype(checkpoint, name))
    else:
        base = f"{checkpoint.prefix}{ffn.split_prefix}."
        for name, tensor in _split_tensors(weights):
            is_packed = tensor.dtype == torch.uint8
            tensors[base + name] = tensor if is_packed else tensor.to(_split_dtype(checkpoint, ffn, name))
        if index in guarded(checkpoint.ffns):
            tensors[checkpoint.prefix + ffn.guard] = torch.zeros(
                1, dtype=_dtype(checkpoint, ffn.down.bias or ffn.down.name)
            )
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _rows_of(checkpoint: Checkpoint, ffn: FFNPlace, name: str, *, neurons: Tensor) -> Tensor:
    """The rows of an adapter's matrix for these neurons, in the form of the up projection."""
    whole = _read_float(checkpoint, name, device=neurons.device)
    if ffn.gate is None or ffn.gate.name != ffn.up.name:
        return whole[neurons]
    gate, up = (_half(whole, place)[neurons] for place in (ffn.gate, ffn.up))
    return joined_halves(gate, up, ffn.up)


def _dtype(checkpoint: Checkpoint, stored: str) -> torch.dtype:
    return FLOATS[checkpoint.tensors[stored].dtype]


def _split_dtype(checkpoint: Checkpoint, ffn: FFNPlace, name: str) -> torch.dtype:
    """The dtype of a split FFN's tensor, such as `heavy.up.weight`: that of the matrix it is made from."""
    role = name.removesuffix("_bias").split(".")[-2 if "." in name else 0]
    places = {"up": [ffn.up], "gate": [ffn.gate or ffn.up], "down": [ffn.down]}
    found = [place for part in role.split("_") for place in places[part]]
    is_bias = name.endswith("bias")
    stored = [place.bias if is_bias and place.bias else place.name for place in found]
    return reduce(torch.promote_types, (_dtype(checkpoint, each) for each in stored))


def _plain_tensors(ffn: FFNPlace, weights: FFNWeights) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors of an ordinary FFN in the original's form: name, the original's name, values.

    The two names differ for an expert of a stack: each has a name of its own until `assemble` stacks them.
    """
    (part,) = weights.parts
    up, down = part.up, replace(part.down, bias=weights.down_bias)
    if ffn.gate is None or part.gate is None:
        pairs = [(ffn.up, up), (ffn.down, down)]
    elif ffn.gate.name == ffn.up.name:
        fused = joined_halves(part.gate.weight, up.weight, ffn.up)
        both = None
        if up.bias is not None and part.gate.bias is not None:
            both = joined_halves(part.gate.bias, up.bias, ffn.up)
        pairs = [(ffn.up, LinearMap.dense(fused, both)), (ffn.down, down)]
    else:
        pairs = [(ffn.up, up), (ffn.gate, part.gate), (ffn.down, down)]
    for place, linear in pairs:
        weight = linear.weight.T if place.transposed else linear.weight
        yield _of_expert(place.name, place), place.name, weight
        if place.bias is not None and linear.bias is not None:
            yield _of_expert(place.bias, place), place.bias, linear.bias
    for name, stored in ffn.row_tensors.items():
        yield stored, stored, part.rows[name]


_STACKED, _BELOW = "#", "+"
"""Before the number of a part of a stack: matrices that lie behind each other, or below each other."""


def _of_expert(name: str, place: MatrixPlace) -> str:
    mark = _BELOW if place.flat else _STACKED
    return name if place.expert is None else f"{name}{mark}{place.expert:06d}"


def stack_experts(spans: Mapping[str, TensorSpan]) -> dict[str, TensorSpan]:
    """The same tensors, with the parts that belong to one stack of experts as one tensor."""
    parts: dict[tuple[str, str], list[TensorSpan]] = {}
    for name in sorted(spans):
        stack = re.fullmatch(rf"(.*)([{_STACKED}{_BELOW}])\d{{6}}", name)
        parts.setdefault((stack[1], stack[2]) if stack else (name, ""), []).append(spans[name])
    return {
        name: TensorSpan.stacked(found, flat=mark == _BELOW) if mark else found[0]
        for (name, mark), found in parts.items()
    }


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
