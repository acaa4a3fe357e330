"""A way to share one budget out over the blocks, as their single errors suggest it.

It is a proposal only: errors of single blocks do not add up to the model's, so whoever takes it has to
judge it end to end against the uniform layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.splitting.solver import Solver

UNIFORM, SENSITIVITY = "uniform", "sensitivity"
HALVING = 0.18
"""The fraction of an FFN's neurons that halves its error, whatever it has already.

What each of MiniLM's layers alone did to the logits on SST-2 at .18, .35 and .53 of its neurons: half as
much at every step (benchmarks/quality-tried.md).
"""
SMALLEST_WEIGHT = 1 / 16
"""No FFN is proposed a fraction under this part of the average one's."""


class Candidate(NamedTuple):
    """One way to share the budget out."""

    name: str
    layouts: tuple[LayerLayout, ...]


def propose(
    solver: Solver, budget: Budget, errors: Sequence[float], *, uniform: tuple[LayerLayout, ...]
) -> Candidate | None:
    """Within the budget, what makes the errors' sum least if they are those of the uniform layers.

    `errors` are those of the model with one FFN alone compressed, an FFN each. None where nothing but the
    uniform layers comes of it.
    """
    sizes = [shape.num_elements for shape in solver.model.shapes]
    kept = solver.model.elements_of(uniform) / solver.model.ffn_elements
    fractions = least_error_fractions(errors, sizes=sizes, kept=kept)
    try:
        layouts = solver.solve(budget, profile=[fraction / kept for fraction in fractions])
    except BudgetError:
        return None
    return None if layouts == uniform else Candidate(SENSITIVITY, layouts)


def least_error_fractions(errors: Sequence[float], *, sizes: Sequence[int], kept: float) -> list[float]:
    """The fraction of each FFN to keep, `kept` of all elements in all.

    Where every HALVING of an FFN halves its error, and costs what it has elements, the sum of the errors
    is least where HALVING log2(error / size), raised by a constant, is kept of each: reverse
    water-filling, within SMALLEST_WEIGHT * kept and 1.
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
