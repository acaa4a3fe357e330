"""The light neurons are dropped, and what is left may make up for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.compressors.base import LayerContext
from ffsplit.compressors.weights import FFNWeights, LinearMap
from ffsplit.config import Record
from ffsplit.ffn import FFNShape, LayerLayout


class PruneCompressor(Record):
    """Drop the light part.

    `least_squares` then refits the heavy hitters' down projection, and the output bias where the
    architecture has one, to the original output on the sampled inputs, with a ridge of `ridge`
    times the mean squared activation that pulls towards the original weights.
    """

    kind: Literal["prune"] = "prune"
    compensation: Literal["none", "least_squares"] = "none"
    ridge: float = Field(default=1e-3, ge=0)

    def plan(self, layout: LayerLayout, *, shape: FFNShape, budget: int) -> LayerLayout | None:
        """Without the light part; where that is all of the FFN, there is nothing left to run."""
        pruned = layout.model_copy(update={"light": None})
        return pruned if pruned.heavy is not None and pruned.num_elements(shape) <= budget else None

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        if ffn.light is None:
            return ffn
        pruned = replace(ffn, light=None)
        if self.compensation == "none":
            return pruned
        return refit_down(pruned, context=context, ridge=self.ridge)


def refit_down(ffn: FFNWeights, *, context: LayerContext, ridge: float) -> FFNWeights:
    """Least-squares fit of `heavy`'s down projection (and bias) to the original FFN's output.

    Minimises the sum over sampled tokens of |y - y'|^2 + ridge * mean(a^2) * T * |W' - W|^2 in
    float64. Nothing but `heavy` may be left of the FFN.
    """
    assert ffn.heavy is not None and ffn.light is None, "only heavy hitters are refitted"
    weight = ffn.heavy.down.weight
    num_neurons, has_bias = len(ffn.heavy.neurons), ffn.down_bias is not None
    size = num_neurons + has_bias
    gram = weight.new_zeros(size, size, dtype=torch.float64)
    cross = weight.new_zeros(size, len(weight), dtype=torch.float64)
    for x_TD in context.chunks():
        a_TN = ffn.heavy.hidden(x_TD, ffn.activation)
        if has_bias:
            a_TN = torch.cat([a_TN, a_TN.new_ones(len(a_TN), 1)], dim=1)
        residual_TD = context.original(x_TD) - ffn(x_TD)
        gram += (a_TN.T @ a_TN).double()
        cross += (a_TN.T @ residual_TD).double()
    change = _solve_ridge(gram, cross, ridge=ridge, num_ridged=num_neurons)
    down = LinearMap.dense((weight.double() + change[:num_neurons].T).to(weight.dtype))
    bias = ffn.down_bias
    if bias is not None:
        bias = (bias.double() + change[num_neurons]).to(bias.dtype)
    return replace(ffn, heavy=replace(ffn.heavy, down=down), down_bias=bias)


def _solve_ridge(gram: Tensor, cross: Tensor, *, ridge: float, num_ridged: int) -> Tensor:
    """Solve (G + ridge * mean(diag G) * I) X = C; the rows past `num_ridged` take no ridge."""
    diagonal = gram.diagonal()
    damping = torch.zeros_like(diagonal)
    damping[:num_ridged] = max(ridge, 1e-10) * diagonal[:num_ridged].mean()
    solution: Tensor = torch.linalg.solve(gram + damping.diag(), cross)
    return solution
