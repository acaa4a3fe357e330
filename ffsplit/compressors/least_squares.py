"""Second moments in float64, the linear systems they form, and fits of a down projection by solving these.

Activations are float32, but are multiplied and summed in float64: a second moment has the square of their
condition number, and from a condition number of 3000 on, float32 cannot resolve that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ffsplit.compressors.base import LayerContext
from ffsplit.errors import CalibrationError
from ffsplit.ffn.weights import FFNWeights, LinearMap

BLOCK_TOKENS = 1024
"""Rows converted to float64 at a time, to bound memory."""
STRIPES = 4
"""x^T x is symmetric: computing this many stripes of its rows, up to the diagonal, takes 5/8 of the work."""
EPSILON = torch.finfo(torch.float64).eps
MOST_TRIES = 12


def refit_down(ffn: FFNWeights, *, context: LayerContext, ridge: float) -> FFNWeights:
    """Fit `heavy`'s down projection (and the output bias, if there is one) to the original's output.

    Minimises the sum over sampled tokens of |y - y'|^2 + ridge * mean(a^2) * T * |W' - W|^2. A light
    part, if any, stays as it is. If float64 cannot tell some inputs apart, as may happen with a ridge of 0,
    the solution is one with a small change.
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
        add_product_(cross, a_TN, y_TD - ffn(x_TD))
        add_moment_(gram, a_TN)
    change = solve_ridge(mirrored(gram), cross, ridge=ridge, num_ridged=num_neurons)
    down = LinearMap.dense((weight.double() + change[:num_neurons].T).to(weight.dtype))
    bias = ffn.down_bias
    if bias is not None:
        bias = (bias.double() + change[num_neurons]).to(bias.dtype)
    return replace(ffn, heavy=replace(ffn.heavy, down=down), down_bias=bias)


def refit_bias(ffn: FFNWeights, *, context: LayerContext) -> FFNWeights:
    """Add the mean of the missing output to the output bias, which is created if there is none.

    Source: FLAP, arXiv:2312.11983, section 3.3.
    """
    missing_D = torch.zeros_like(context.inputs[0][0], dtype=torch.float64)
    num_tokens = 0
    for x_TD, y_TD in context.pairs():
        missing_D += (y_TD - ffn(x_TD)).sum(0, dtype=torch.float64)
        num_tokens += len(x_TD)
    mean_D = (missing_D / max(1, num_tokens)).float()
    return replace(ffn, down_bias=mean_D if ffn.down_bias is None else ffn.down_bias + mean_D)


def second_moment(inputs: Iterable[Tensor]) -> Tensor:
    """Sum over matrices [T, n] of x^T x: [n, n], multiplied in float64. At least one matrix is required."""
    total: Tensor | None = None
    for x_TN in inputs:
        if total is None:
            total = x_TN.new_zeros(x_TN.shape[1], x_TN.shape[1], dtype=torch.float64)
        add_moment_(total, x_TN)
    assert total is not None, "there are no inputs"
    return mirrored(total)


def add_moment_(total_NN: Tensor, x_TN: Tensor) -> None:
    """Add x^T x to the lower triangle of `total_NN`, float64; `mirrored` fills in the rest."""
    width = -(-len(total_NN) // STRIPES)
    for x in _in_float64(x_TN):
        for start in range(0, len(total_NN), width):
            stop = min(start + width, len(total_NN))
            total_NN[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def add_product_(total: Tensor, left_TN: Tensor, right_TD: Tensor) -> None:
    """Add left^T right to `total` [N, D], float64."""
    for left, right in zip(_in_float64(left_TN), _in_float64(right_TD), strict=True):
        total.addmm_(left.T, right)


def _in_float64(x_TN: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in torch.split(x_TN, BLOCK_TOKENS))


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).T


def solve_ridge(gram: Tensor, cross: Tensor, *, ridge: float, num_ridged: int) -> Tensor:
    """Solve (G + ridge * mean(diag G) * I) X = C; rows past `num_ridged` get no ridge."""
    ridged = torch.zeros_like(gram.diagonal())
    ridged[:num_ridged] = ridge * gram.diagonal()[:num_ridged].mean()
    solution: Tensor = torch.cholesky_solve(cross, damped_root(gram, ridged))
    return solution


def ridged_root(moment: Tensor, *, ridge: float, noise: Tensor | None = None) -> Tensor:
    """`damped_root` of a second moment with `ridge` times its mean square on the diagonal."""
    diagonal = moment.diagonal()
    return damped_root(moment, (ridge * diagonal.mean()).expand_as(diagonal), noise=noise)


def damped_root(moment: Tensor, damping: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """Lower Cholesky factor of a second moment [n, n] with at least `damping` [n] on its diagonal.

    Each diagonal element also gets its rounding error: n * eps times itself, or times `noise` [n] if it is a
    small difference of such numbers. So a root exists for any inputs, whatever the scale of each. A neuron
    that never fires gets next to nothing. Raises CalibrationError when the moment is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise CalibrationError(
            "the sampled inputs of an FFN, or its activations, are not finite: look for NaN or infinite "
            "weights, or compute in a wider --dtype"
        )
    size = noise if noise is not None else moment.diagonal()
    floor = len(moment) * EPSILON * torch.where(size > 0, size, size.mean() if size.any() else 1.0)
    for _ in range(MOST_TRIES):
        root, failed = torch.linalg.cholesky_ex(moment + (damping + floor).diag())
        if not int(failed):
            return root  # type: ignore[no-any-return]
        floor = 10 * floor
    raise AssertionError("a second moment is positive semidefinite up to rounding")
