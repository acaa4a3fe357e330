"""Rounds a matrix to integers so that its outputs change little: GPTQ, with searched scales.

Source: GPTQ, arXiv:2210.17323: round one input channel at a time, and adjust those that follow to make up
for the error. Here in blocks, so that most of the work is matrix products. Shape suffixes: R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffsplit.compressors.least_squares import mirrored, ridged_root
from ffsplit.ffn.quantization import SCALE_DTYPE, integer_limits, scales_of, spread_scales
from ffsplit.ffn.shapes import Integer

BLOCK_COLUMNS = 128
BLOCK_TOKENS = 1024
"""Rows whose products are summed in float32; their sums are added in float64."""
SHRINKS = tuple(0.6 + 0.05 * step for step in range(10))
"""Scales that are tried, as fractions of the one that maps a group's largest magnitude to -8."""


def moment_of(inputs: Iterable[Tensor]) -> Tensor:
    """Sum over matrices [T, K] of x^T x: [K, K] float64, multiplied in float32.

    Good enough for GPTQ, whose ridge is far above the rounding error of such products. Takes a fraction of
    `second_moment`'s time on a CPU. At least one matrix is required.
    """
    total: Tensor | None = None
    for x_TK in inputs:
        found = product_of(x_TK, x_TK)
        total = found if total is None else total.add_(found)
    assert total is not None, "there are no inputs"
    return mirrored(total)


def product_of(left_TK: Tensor, right_TD: Tensor) -> Tensor:
    """left^T right: [K, D] float64, multiplied in float32."""
    total = left_TK.new_zeros(left_TK.shape[1], right_TD.shape[1], dtype=torch.float64)
    blocks = (torch.split(each, BLOCK_TOKENS) for each in (left_TK, right_TD))
    for left, right in zip(*blocks, strict=True):
        total += left.T @ right
    return total


def root_of_inverse(moment: Tensor, *, ridge: float) -> Tensor:
    """The upper triangular U with U^T U = H^-1, where H is the moment with its ridge: [K, K] float64.

    It is the inverse of the upper triangular R with R R^T = H. Inverting H itself would give a rounding error
    in proportion to its largest element, which would hide the smallest ones.
    """
    upper = ridged_root(moment.flip(0, 1), ridge=ridge).flip(0, 1)
    root: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
    return root


def searched_scales(weight: Tensor, *, group_size: int, importance_K: Tensor) -> Tensor:
    """The scale of each row's groups that gives 4-bit integers the smallest weighted squared error.

    Integers are -8 to 7, so the sign of a scale matters: both are tried, with every fraction in SHRINKS.
    Returns [R, groups] bfloat16. A group of zeros gets the smallest normal scale.
    """
    scales = []
    smallest = torch.finfo(SCALE_DTYPE).smallest_normal
    groups = torch.split(weight, group_size, dim=1)
    for group, weight_K in zip(groups, torch.split(importance_K, group_size), strict=True):
        largest = (group.abs().amax(dim=1, keepdim=True) / 8).clamp(min=smallest)
        best = torch.full_like(largest, torch.inf)
        scale = largest.clone()
        for fraction in (sign * shrink for shrink in SHRINKS for sign in (1, -1)):
            tried = (largest * fraction).to(SCALE_DTYPE).float()
            change = (group / tried).round_().clamp_(-8, 7).mul_(tried).sub_(group)
            error = change.square_().mul_(weight_K).sum(dim=1, keepdim=True)
            is_better = error < best
            best, scale = torch.where(is_better, error, best), torch.where(is_better, tried, scale)
        scales.append(scale)
    return torch.cat(scales, dim=1).to(SCALE_DTYPE)


@dataclass(frozen=True)
class Rounded:
    """Integers [R, K] in floating point, and their scales [R, groups] bfloat16."""

    integers: Tensor
    scales: Tensor


def round_together(
    matrices: Sequence[tuple[Tensor, Integer]], moment: Tensor, *, ridge: float
) -> list[Rounded]:
    """Round matrices [R, K1], [R, K2] ... to their formats, so that the sum of their outputs changes little.

    `moment` is the second moment of all their inputs side by side. Columns with fewer bits are rounded first,
    and among those the ones with the largest inputs, so that the others can make up for their errors.
    """
    columns = list(torch.split(torch.arange(len(moment), device=moment.device), _widths(matrices)))
    energy = moment.diagonal()
    by_bits = sorted(range(len(matrices)), key=lambda index: matrices[index][1].num_bits)
    order = torch.cat([columns[i][energy[columns[i]].argsort(descending=True, stable=True)] for i in by_bits])
    root = root_of_inverse(moment[order[:, None], order], ridge=ridge)
    importance = torch.empty_like(energy)
    importance[order] = 1 / root.square().sum(dim=0)  # what is left of an input, given all the others
    scales, spread, limits = [], [], []
    for (weight, format), its_columns in zip(matrices, columns, strict=True):
        scale = _scales(weight, format, importance[its_columns].float())
        scales.append(scale)
        wide = spread_scales(scale, num_columns=len(its_columns), group_size=format.group_size)
        spread.append(wide.expand(weight.shape))
        limits += [integer_limits(format.num_bits)] * len(its_columns)
    weight, scale_RK = (torch.cat(each, dim=1) for each in ([weight for weight, _ in matrices], spread))
    integers = gptq(weight, scale_RK, limits=limits, order=order, root=root)
    found = torch.split(integers, _widths(matrices), dim=1)
    return [Rounded(*each) for each in zip(found, scales, strict=True)]


def _widths(matrices: Sequence[tuple[Tensor, Integer]]) -> list[int]:
    return [weight.shape[1] for weight, _ in matrices]


def _scales(weight: Tensor, format: Integer, importance_K: Tensor) -> Tensor:
    if format.num_bits == 8:
        return scales_of(weight, num_bits=8, group_size=format.group_size)
    size = min(format.group_size or weight.shape[1], weight.shape[1])
    return searched_scales(weight, group_size=size, importance_K=importance_K)


def gptq(
    weight: Tensor, scale_RK: Tensor, *, limits: Sequence[tuple[int, int]], order: Tensor, root: Tensor
) -> Tensor:
    """Integers [R, K] whose products with `scale_RK` have outputs close to those of `weight`.

    Columns are rounded in `order` [K], each within its own of the `limits`. `root` [K, K] is
    `root_of_inverse` of the second moment of the inputs in that order.
    """
    left_KR, scale_KR = (each.T[order].contiguous() for each in (weight, scale_RK))
    root, limits = root.to(left_KR.dtype), [limits[column] for column in order.tolist()]
    pivots, found_KR = root.diagonal().tolist(), torch.empty_like(left_KR)
    for start in range(0, len(left_KR), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(left_KR))
        error_KR = torch.empty_like(left_KR[start:stop])
        for k in range(start, stop):
            found_KR[k] = (left_KR[k] / scale_KR[k]).round_().clamp_(*limits[k])
            error_KR[k - start] = (left_KR[k] - found_KR[k] * scale_KR[k]) / pivots[k]
            left_KR[k + 1 : stop].addr_(root[k, k + 1 : stop], error_KR[k - start], alpha=-1)
        left_KR[stop:].addmm_(root[start:stop, stop:].T, error_KR, alpha=-1)
    integers_KR = torch.empty_like(found_KR)
    integers_KR[order] = found_KR
    return integers_KR.T
