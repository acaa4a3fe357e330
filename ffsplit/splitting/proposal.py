"""How one budget may be divided over the layers.

A division is only a proposal: the errors of single layers do not add up to the model's. The caller must
compare it end to end with uniform layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.splitting.knapsack import Curve, best_layouts
from ffsplit.splitting.solver import Solver

UNIFORM, SENSITIVITY, TABLES = "uniform", "sensitivity", "tables"
HALVING = 0.18
"""Every additional fraction of this size of an FFN's neurons halves its error.

Measured with MiniLM on SST-2: with one layer compressed to .18, .35 and .53 of its neurons, the error of the
logits halved at every step (benchmarks/quality-tried.md).
"""
SMALLEST_WEIGHT = 1 / 16
"""No FFN is given less than this share of the average fraction."""


class Candidate(NamedTuple):
    """One way to divide the budget."""

    name: str
    layouts: tuple[LayerLayout, ...]


def propose(
    solver: Solver, budget: Budget, errors: Sequence[float], *, uniform: tuple[LayerLayout, ...]
) -> Candidate | None:
    """The layouts within the budget with the smallest predicted sum of errors.

    `errors` has one number per FFN: the model's error with only that FFN in its uniform layout. None if
    these layouts are the uniform ones, or do not fit.
    """
    sizes = [shape.num_elements for shape in solver.model.shapes]
    kept = solver.model.elements_of(uniform) / solver.model.ffn_elements
    fractions = least_error_fractions(errors, sizes=sizes, kept=kept)
    try:
        layouts = solver.solve(budget, profile=[fraction / kept for fraction in fractions])
    except BudgetError:
        return None
    return None if layouts == uniform else Candidate(SENSITIVITY, layouts)


def propose_widths(
    solver: Solver, budget: Budget, curves: Sequence[Curve], *, uniform: tuple[LayerLayout, ...]
) -> Candidate | None:
    """The layouts within the budget with the smallest sum of errors by the curves of all FFNs.

    None if these layouts are the uniform ones, or do not fit.
    """
    try:
        layouts = best_layouts(solver, budget, curves)
    except BudgetError:
        return None
    return None if layouts == uniform else Candidate(TABLES, layouts)


def least_error_fractions(errors: Sequence[float], *, sizes: Sequence[int], kept: float) -> list[float]:
    """The fraction of each FFN to keep, so that `kept` of all elements are kept.

    Assume that every HALVING of an FFN halves its error, at a cost in proportion to its size. Then the sum
    of errors is smallest if each FFN keeps HALVING log2(error / size) plus a common constant: reverse
    water-filling, clamped to SMALLEST_WEIGHT * kept and 1.
    """
    least = 1e-9 * max(*errors, 1e-300)
    levels = [
        HALVING * math.log2(max(error, least) / size) for error, size in zip(errors, sizes, strict=True)
    ]

    def fractions(raised: float) -> list[float]:
        return [min(1.0, max(SMALLEST_WEIGHT * kept, level + raised)) for level in levels]

    low, high = -max(levels), 1.0 - min(levels)
    for _ in range(60):
        middle = (low + high) / 2
        taken = sum(size * each for size, each in zip(sizes, fractions(middle), strict=True)) / sum(sizes)
        low, high = (low, middle) if taken > kept else (middle, high)
    return fractions(low)
