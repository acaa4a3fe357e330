"""Least-squares fits of a down projection to the original FFN's output, in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ffsplit.compressors.base import LayerContext
from ffsplit.compressors.damping import damped_root
from ffsplit.compressors.weights import FFNWeights, LinearMap

SMALLEST_RIDGE = 1e-10
"""Keeps neurons that never fire from making the system singular."""


def refit_down(ffn: FFNWeights, *, context: LayerContext, ridge: float) -> FFNWeights:
    """Fit `heavy`'s down projection (and the output bias, where there is one) to the original's output.

    Minimises the sum over sampled tokens of |y - y'|^2 + ridge * mean(a^2) * T * |W' - W|^2. A light
    part, if any, stays as it is.
    """
    assert ffn.heavy is not None, "there are no heavy hitters to refit"
    weight = ffn.heavy.down.weight
    num_neurons, has_bias = len(ffn.heavy.neurons), ffn.down_bias is not None
    size = num_neurons + has_bias
    gram = weight.new_zeros(size, size, dtype=torch.float64)
    cross = weight.new_zeros(size, len(weight), dtype=torch.float64)
    for x_TD, y_TD in context.pairs():
        a_TN = ffn.heavy.hidden(x_TD, ffn.activation)
        if has_bias:
            a_TN = torch.cat([a_TN, a_TN.new_ones(len(a_TN), 1)], dim=1)
        residual_TD = y_TD - ffn(x_TD)
        gram += (a_TN.T @ a_TN).double()
        cross += (a_TN.T @ residual_TD).double()
    change = solve_ridge(gram, cross, ridge=ridge, num_ridged=num_neurons)
    down = LinearMap.dense((weight.double() + change[:num_neurons].T).to(weight.dtype))
    bias = ffn.down_bias
    if bias is not None:
        bias = (bias.double() + change[num_neurons]).to(bias.dtype)
    return replace(ffn, heavy=replace(ffn.heavy, down=down), down_bias=bias)


def refit_bias(ffn: FFNWeights, *, context: LayerContext) -> FFNWeights:
    """Add the mean of what is missing to the output bias; one is made where there is none.

    Source: FLAP, arXiv:2312.11983, section 3.3.
    """
    missing_D = torch.zeros_like(context.inputs[0][0], dtype=torch.float64)
    num_tokens = 0
    for x_TD, y_TD in context.pairs():
        missing_D += (y_TD - ffn(x_TD)).sum(0, dtype=torch.float64)
        num_tokens += len(x_TD)
    mean_D = (missing_D / max(1, num_tokens)).float()
    return replace(ffn, down_bias=mean_D if ffn.down_bias is None else ffn.down_bias + mean_D)


def solve_ridge(gram: Tensor, cross: Tensor, *, ridge: float, num_ridged: int) -> Tensor:
    """Solve (G + ridge * mean(diag G) * I) X = C; the rows past `num_ridged` take no ridge."""
    root = damped_root(gram, ridge=max(ridge, SMALLEST_RIDGE), num_ridged=num_ridged)
    return torch.cholesky_solve(cross, root)
