"""An FFN of a transformers model made narrower: the same modules, with fewer neurons."""

from __future__ import annotations

from typing import Any

from torch import nn

from ffsplit.models.rows import FFNPaths


def narrow_ffn(block: nn.Module, paths: FFNPaths, width: int) -> None:
    """Give a block's FFN `width` neurons. Its weights are empty afterwards: they are about to be read."""
    for path in dict.fromkeys(each for each in (paths.up, paths.gate) if each is not None):
        rows = 2 * width if paths.fused else width
        _resize(block.get_submodule(path), rows=rows, transposed=paths.transposed)
    _resize(block.get_submodule(paths.down), columns=width, transposed=paths.transposed)


def _resize(
    linear: Any, *, rows: int | None = None, columns: int | None = None, transposed: bool = False
) -> None:
    """Another number of outputs or inputs for an nn.Linear, or for transformers' Conv1D (`transposed`)."""
    weight = linear.weight
    shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
    shape = (rows or shape[0], columns or shape[1])
    linear.weight = _empty_like(weight, shape[::-1] if transposed else shape)
    if rows is not None and linear.bias is not None:
        linear.bias = _empty_like(linear.bias, (rows,))
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, size in zip(names, shape, strict=True):
        setattr(linear, name, size)


def _empty_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
