"""Widths for all layers within one budget, from what the whole model loses where one layer is narrower.

A table has, for some widths of one FFN, the model's error with that FFN alone at this width. Between the
measured widths it is interpolated. The sum over the layers is only a forecast: a caller must compare its
solution end to end with uniform layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ffsplit.calibration.statistics import Floats
from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.ffn.shapes import FAST_MULTIPLES, FFNShape, LayerLayout
from ffsplit.splitting.layer import last_true
from ffsplit.splitting.solver import Layouts, Solver

TABLE_TOKENS = {"cuda": 8192, "cpu": 2048}
"""How many tokens the tables are measured on, about. A CPU takes minutes for these few."""
KL_ROWS = 1024
"""Tokens whose log-probabilities are held at a time, in float32."""

BELOW, ABOVE = (0.25, 0.5, 0.75, 1.0), (0.25, 0.6)
"""Measured widths: these parts of the uniform width, and these parts of the way from it to the whole FFN."""
KL_ROWS = 1024
"""Tokens whose log-probabilities are held at a time, in float32."""
FEWEST_STEPS = 16
"""Widths are multiples of the largest fast one of which an FFN has at least so many."""


class WidthTable(NamedTuple):
    """Measured widths of one FFN, ascending up to the whole FFN, and the model's error at each."""

    widths: tuple[int, ...]
    errors: tuple[float, ...]


def width_step(shape: FFNShape, *, multiple: int | None = None) -> int:
    """The number of neurons that widths are multiples of: a recipe's `multiple`, if it has one."""
    if multiple is not None:
        return math.lcm(multiple, shape.width_multiple)
    fast = [each for each in FAST_MULTIPLES if shape.num_neurons >= each * FEWEST_STEPS]
    return max((*fast[:1], shape.width_multiple))


def measured_widths(shape: FFNShape, *, kept: float, multiple: int | None = None) -> tuple[int, ...]:
    """The widths to measure where `kept` of an FFN's elements are kept on average: the whole FFN is last."""
    step, whole = width_step(shape, multiple=multiple), shape.num_neurons
    parts = [*(kept * part for part in BELOW), *(kept + (1 - kept) * part for part in ABOVE)]
    widths = {max(step, round(part * whole / step) * step) for part in parts}
    return (*sorted(width for width in widths if width < whole), whole)


class Curve(NamedTuple):
    """The errors of one FFN at the widths that it may get: convex, and 0 for the whole FFN.

    The whole FFN is left out if the recipe's multiple does not divide its width.
    """

    widths: tuple[int, ...]
    errors: Floats


def curve_of(table: WidthTable, *, step: int, multiple: int | None = None) -> Curve:
    """The largest convex curve below a table, at all multiples of `step` from its narrowest width on.

    A wider FFN counts as no worse than a narrower one. In between, the root of the error changes evenly: the
    KL divergence, or a squared error, of a small change is quadratic in its size.
    """
    first, whole = table.widths[0], table.widths[-1]
    widths = np.array(sorted({*table.widths[:1], *range(first + step - first % step, whole, step), whole}))
    errors = np.minimum.accumulate(np.array(table.errors))
    roots = np.interp(widths, np.array(table.widths), np.sqrt(errors - errors[-1]))
    errors = _lower_hull(widths.astype(np.float64), roots**2)
    allowed = slice(None if whole % (multiple or 1) == 0 else -1)
    return Curve(tuple(widths.tolist()[allowed]), errors[allowed])


def _lower_hull(x: Floats, y: Floats) -> Floats:
    """The largest convex function that is nowhere above these points, at the same places."""
    corners: list[int] = []
    for new in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[new] - x[a]) < (y[new] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(new)
    return np.interp(x, x[corners], y[corners])


def best_order(curves: Sequence[Curve], *, costs: Sequence[int]) -> list[int]:
    """The order in which layers get their next step of neurons, all starting at their narrowest width.

    `costs` are those of a neuron. The step that removes the most error at its cost comes first. Curves are
    convex, so after any number of steps no other widths of the same cost have a smaller sum of errors, if
    all steps cost the same. Layers that are alike take turns.
    """
    steps = []
    for layer, (curve, cost) in enumerate(zip(curves, costs, strict=True)):
        gains = -np.diff(curve.errors) / (np.diff(np.array(curve.widths)) * cost)
        gains = np.minimum.accumulate(gains)  # no step before an earlier one, whatever the rounding
        steps += [(-gain, number, layer) for number, gain in enumerate(gains.tolist())]
    return [layer for _, _, layer in sorted(steps)]


def best_layouts(solver: Solver, budget: Budget, curves: Sequence[Curve]) -> Layouts:
    """The layouts within the budget with the smallest sum of errors.

    Raises BudgetError if the narrowest widths of the curves are too wide for it.
    """
    shapes = solver.model.shapes
    order = best_order(curves, costs=[shape.elements_per_neuron for shape in shapes])

    def layouts(num_steps: int) -> Layouts:
        taken = np.bincount(order[:num_steps], minlength=len(shapes))
        widths = [curve.widths[index] for curve, index in zip(curves, taken, strict=True)]
        return tuple(LayerLayout.dense(*each) for each in zip(shapes, widths, strict=True))

    def holds(num_steps: int) -> bool:
        return solver.meets(budget, layouts(num_steps))

    if not holds(0):
        raise BudgetError(f"{budget} is below the narrowest widths that were measured")
    return layouts(last_true(holds, first=0, last=len(order) + 1))


def nearest_measured(layouts: Layouts, tables: Sequence[WidthTable]) -> tuple[int, ...]:
    """The measured width of each FFN that is nearest to that of its layout; of two, the narrower one."""
    return tuple(
        min(table.widths, key=lambda width: (abs(width - layout.num_neurons), width))
        for layout, table in zip(layouts, tables, strict=True)
    )
