"""Truncated singular value decompositions of the light neurons' matrices.

Sources: Eckart and Young, 1936 (the best rank-R approximation in the Frobenius norm); SVD-LLM,
arXiv:2403.07378 (the best approximation of its outputs, by whitening its inputs).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.compressors.base import FLOAT64_BYTES, LayerContext, LayerWork
from ffsplit.compressors.least_squares import ridged_root, second_moment
from ffsplit.config import Record
from ffsplit.errors import CalibrationError, explained
from ffsplit.ffn.shapes import (
    Dense,
    FFNShape,
    Format,
    LayerLayout,
    LowRank,
    PartLayout,
    rounded_down,
)
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap


class LowRankCompressor(Record):
    """Replace every matrix of the light part by two factors, of the largest rank that the budget allows.

    `whiten` minimises the error of the matrices' outputs on the sampled inputs instead of their own error,
    with a ridge of `ridge` times the mean squared input. `energy` in (0, 1] lowers the rank to the one that
    holds this share of the squared singular values, if that is smaller.
    """

    kind: Literal["low_rank"] = "low_rank"
    whiten: bool = False
    energy: float = Field(default=1.0, gt=0, le=1)
    ridge: float = Field(default=1e-4, ge=0)

    @property
    def adds_down_bias(self) -> bool:
        return False

    def plan(
        self, layout: LayerLayout, *, shape: FFNShape, budget: int, multiple: int | None = None
    ) -> LayerLayout | None:
        """The largest common rank that fits, rounded down.

        Matrices stay dense if their factors would be no smaller.
        """
        if layout.light is None:
            return layout if layout.num_elements(shape) <= budget else None
        num_neurons = layout.light.num_neurons
        without_light = layout.model_copy(update={"light": None})
        left_over = budget - without_light.num_elements(shape) - layout.light.num_biases(shape)
        num_matrices = 3 if shape.gated else 2
        cost = num_matrices * (num_neurons + shape.hidden_size)
        rank = rounded_down(left_over // cost, multiple=multiple, cost=cost, whole=shape.num_elements)
        if rank < 1:
            return None
        smaller = rank * (num_neurons + shape.hidden_size) < num_neurons * shape.hidden_size
        format: Format = LowRank(rank=rank) if smaller else Dense()
        light = PartLayout(
            num_neurons=num_neurons, up=format, gate=format if shape.gated else None, down=format
        )
        return layout.model_copy(update={"light": light})

    def memory_bytes(self, work: LayerWork) -> int:
        """The matrices in float64, or with `whiten` the second moments of their inputs."""
        num_neurons, hidden = work.shape.num_neurons, work.shape.hidden_size
        square = max(num_neurons, hidden) ** 2
        return 3 * (square if self.whiten else num_neurons * hidden) * FLOAT64_BYTES

    def operations(self, work: LayerWork) -> float:
        num_neurons, hidden = work.shape.num_neurons, work.shape.hidden_size
        return 20.0 * num_neurons * hidden * min(num_neurons, hidden)

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        if ffn.light is None or layout.light is None or not isinstance(layout.light.up, LowRank):
            return ffn
        part, rank = ffn.light, layout.light.up.rank
        roots: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.whiten:
            activations = (part.hidden(x_TD, ffn.activation) for x_TD in context.chunks())
            moments = (second_moment(context.chunks()), second_moment(activations))
            roots = (ridged_root(moments[0], ridge=self.ridge), ridged_root(moments[1], ridge=self.ridge))

        def factorized(linear: LinearMap, root: Tensor | None) -> LinearMap:
            left, right = truncated_svd(linear.weight, rank=rank, energy=self.energy, root=root)
            return LinearMap.low_rank(left, right, linear.bias)

        gate = None if part.gate is None else factorized(part.gate, roots[0])
        light = FFNPart(part.neurons, factorized(part.up, roots[0]), gate, factorized(part.down, roots[1]))
        return replace(ffn, light=light)


def truncated_svd(
    weight: Tensor, *, rank: int, energy: float = 1.0, root: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors [rows, R] and [R, columns] of a matrix W, with R at most `rank`.

    They minimise |(W - W') L|, Frobenius norm, where `root` L [columns, columns] is a lower
    triangular root of the inputs' second moment (None: the identity). The singular values are split
    evenly between the factors, so that both have entries of similar size.
    """
    target = weight.double() if root is None else weight.double() @ root
    with explained("a matrix's singular values cannot be computed", kind=CalibrationError):
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    rank = min(rank, int((share < energy - 1e-12).sum()) + 1)
    scale = s[:rank].sqrt()
    right = scale[:, None] * vh[:rank]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return (u[:, :rank] * scale).to(weight.dtype), right.to(weight.dtype)
