"""Truncated singular value decomposition of the light neurons' matrices.

Source: Eckart and Young, 1936 (the best rank-R approximation in the Frobenius norm).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ffsplit.compressors.base import LayerContext
from ffsplit.compressors.weights import FFNPart, FFNWeights, LinearMap
from ffsplit.config import Record
from ffsplit.ffn import Dense, FFNShape, Format, LayerLayout, LowRank, PartLayout


class LowRankCompressor(Record):
    """Every matrix of the light part becomes two factors of one common rank."""

    kind: Literal["low_rank"] = "low_rank"

    def plan(self, layout: LayerLayout, *, shape: FFNShape, budget: int) -> LayerLayout | None:
        """The largest rank that fits. A factorisation no smaller than the matrix leaves it dense."""
        if layout.light is None:
            return layout if layout.num_elements(shape) <= budget else None
        num_neurons = layout.light.num_neurons
        without_light = layout.model_copy(update={"light": None})
        left_over = budget - without_light.num_elements(shape) - layout.light.num_biases(shape)
        num_matrices = 3 if shape.gated else 2
        rank = left_over // (num_matrices * (num_neurons + shape.hidden_size))
        if rank < 1:
            return None
        smaller = rank * (num_neurons + shape.hidden_size) < num_neurons * shape.hidden_size
        format: Format = LowRank(rank=rank) if smaller else Dense()
        light = PartLayout(
            num_neurons=num_neurons, up=format, gate=format if shape.gated else None, down=format
        )
        return layout.model_copy(update={"light": light})

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        if ffn.light is None or layout.light is None:
            return ffn
        light = FFNPart(
            neurons=ffn.light.neurons,
            up=_factorize(ffn.light.up, layout.light.up),
            gate=None if ffn.light.gate is None else _factorize(ffn.light.gate, layout.light.up),
            down=_factorize(ffn.light.down, layout.light.down),
        )
        return replace(ffn, light=light)


def _factorize(linear: LinearMap, format: Format) -> LinearMap:
    if not isinstance(format, LowRank):
        return linear
    left, right = truncated_svd(linear.weight, rank=format.rank)
    return LinearMap.low_rank(left, right, linear.bias)


def truncated_svd(weight: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """The factors [rows, R] and [R, columns] of the best rank-R approximation of a matrix.

    The singular values are shared evenly between the two, so that both have entries of one size.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * vh[:rank]).to(weight.dtype)
