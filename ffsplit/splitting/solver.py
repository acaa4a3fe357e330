"""From a budget of any kind to the layout of every layer, and how one budget may be divided over the layers.

A division is only a proposal: the errors of single layers do not add up to the model's. The caller must
compare it end to end with uniform layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from ffsplit.config import Budget, Record
from ffsplit.errors import BudgetError
from ffsplit.ffn.shapes import (
    MAX_LOSS_TO_ROUNDING,
    FFNShape,
    LayerLayout,
    ModelShape,
    PartLayout,
    is_narrowed_form,
    rounded_down,
)
from ffsplit.splitting.latency import LatencyTable

if TYPE_CHECKING:
    from ffsplit.compressors.base import Compressor


class HeavyRule(Record):
    """How many heavy hitters: a share of the layer's budget, a fraction of its neurons, or as many as hold a
    share of its output energy."""

    by: Literal["share", "fraction", "energy"]
    value: float = Field(ge=0, le=1)

    def num_wanted(self, shape: FFNShape, *, budget: int, num_energetic: int) -> int:
        """How many neurons the rule asks for, whether or not the budget has room for them.

        `num_energetic` is how many hold `value` of the energy, according to the statistics; only an energy
        rule uses it.
        """
        if self.value == 0:
            return 0
        if self.by == "energy":
            return num_energetic
        if self.by == "fraction":
            width = max(1, int(self.value * shape.num_neurons + 1e-9))
        else:
            for_neurons = budget - shape.hidden_size * shape.down_bias
            width = max(0, int(self.value * for_neurons)) // shape.elements_per_neuron
        return rounded_down(width, most_lost=MAX_LOSS_TO_ROUNDING * budget / shape.elements_per_neuron)


def fit_layer(
    shape: FFNShape,
    *,
    budget: int,
    heavy: HeavyRule,
    steps: Sequence[Compressor],
    num_energetic: int = 1,
) -> LayerLayout | None:
    """The layout of one layer in at most `budget` elements, or None if none fits.

    There are as many heavy hitters as `heavy` asks for, or fewer if the rest would not fit beside them. They
    are kept dense; the steps shrink the rest.
    """
    if budget >= shape.num_elements:
        return LayerLayout.dense(shape)
    adds_bias = not shape.down_bias and any(step.adds_down_bias for step in steps)
    for_ffn = budget - shape.hidden_size * adds_bias
    wanted = min(
        heavy.num_wanted(shape, budget=for_ffn, num_energetic=num_energetic),
        (for_ffn - shape.hidden_size * shape.down_bias) // shape.elements_per_neuron,
    )

    def planned(width: int) -> LayerLayout | None:
        return _planned(shape, width=width, budget=budget, steps=steps)

    narrowest = planned(shape.width_multiple) if shape.width_multiple < shape.num_neurons else None
    multiple = shape.width_multiple if narrowest is not None and narrowest.is_dense else 1
    wanted -= wanted % multiple
    fewest = multiple if heavy.value > 0 else 0
    if wanted < fewest:
        return None
    layout = planned(wanted)
    if layout is not None or planned(fewest) is None:
        return layout
    return planned(last_true(lambda width: planned(width) is not None, first=fewest, last=wanted))


def _planned(shape: FFNShape, *, width: int, budget: int, steps: Sequence[Compressor]) -> LayerLayout | None:
    """The layout with `width` heavy hitters; None if the steps cannot fit the rest."""
    assert width < shape.num_neurons, "a budget below the whole FFN leaves a neuron out"
    layout = LayerLayout(
        heavy=PartLayout.dense(shape, width) if width else None,
        light=PartLayout.dense(shape, shape.num_neurons - width),
        down_bias=shape.down_bias,
    )
    for step in steps:
        planned = step.plan(layout, shape=shape, budget=budget)
        if planned is None:
            return None
        layout = planned
    return layout if layout.num_elements(shape) <= budget else None


def uniform_layouts(
    shapes: Sequence[FFNShape],
    *,
    keep: float,
    heavy: HeavyRule,
    steps: Sequence[Compressor],
    num_energetic: Sequence[int] | None = None,
) -> tuple[LayerLayout, ...]:
    """Keep the same fraction of every layer: one common width if all layers have one shape.

    `num_energetic`, one number per layer, is for an energy rule. Raises BudgetError, with the smallest
    `keep` that works, when a layer cannot be made so small.
    """
    counts = num_energetic or [1] * len(shapes)
    layouts = []
    for shape, count in zip(shapes, counts, strict=True):
        budget = element_budget(shape, keep)
        layout = fit_layer(shape, budget=budget, heavy=heavy, steps=steps, num_energetic=count)
        if layout is None:
            smallest = max(smallest_keep(each, heavy=heavy, steps=steps) for each in set_of(shapes))
            if smallest >= 1:
                raise BudgetError(f"--keep {keep:g} cannot be met: the recipe's steps make no FFN smaller")
            raise BudgetError(
                f"--keep {keep:g} is too small for one neuron per FFN: the smallest is {smallest:.6f}"
            )
        layouts.append(layout)
    return tuple(layouts)


def element_budget(shape: FFNShape, keep: float) -> int:
    """The number of elements in a fraction of a layer."""
    return int(keep * shape.num_elements + 1e-9)


def set_of(shapes: Sequence[FFNShape]) -> list[FFNShape]:
    """Each shape once."""
    return list(dict.fromkeys(shapes))


def smallest_keep(shape: FFNShape, *, heavy: HeavyRule, steps: Sequence[Compressor]) -> float:
    """The smallest fraction at which `fit_layer` succeeds, rounded up to six decimals."""

    def too_small(budget: int) -> bool:
        return fit_layer(shape, budget=budget, heavy=heavy, steps=steps) is None

    high = last_true(too_small, first=0, last=shape.num_elements) + 1
    return -(-high * 1_000_000 // shape.num_elements) / 1_000_000


def last_true(holds: Callable[[int], bool], *, first: int, last: int) -> int:
    """The largest number below `last` for which `holds` is true; from `first` on, it turns false once."""
    low, high = first, last
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


Layouts = tuple[LayerLayout, ...]
OF_THE_WHOLE_MODEL = ("max_parameters", "max_latency_ms")
"""Budgets of the whole model, of which FFNs get what the rest leaves. Other budgets limit FFNs alone."""


@dataclass(frozen=True)
class Solver:
    """Finds the largest layouts that a budget allows, for one model and recipe.

    `finish` is the recipe's last step, after all others: it stores the same elements in fewer bytes.
    `latency` is for budgets in milliseconds. `num_energetic`, one number per layer, is for an energy rule;
    without it, that rule counts as one neuron per layer, the least it can ask for.
    """

    model: ModelShape
    heavy: HeavyRule
    steps: Sequence[Compressor]
    finish: Compressor | None = None
    latency: LatencyTable | None = None
    num_energetic: tuple[int, ...] | None = None

    def cost(self, budget: Budget, layouts: Sequence[LayerLayout]) -> float:
        """The cost of these layouts, in the budget's units."""
        if budget.kind == "max_bytes":
            return self.model.bytes_of(self.stored(layouts))
        if budget.kind == "max_parameters":
            return self.model.parameters_of(layouts)
        if budget.kind == "max_latency_ms":
            return self._latency_ms(layouts)
        return self.model.elements_of(layouts) / self.model.ffn_elements

    def stored(self, layouts: Sequence[LayerLayout]) -> Layouts:
        """The layouts as the final checkpoint stores them."""
        return stored_layouts(layouts, self.model.shapes, finish=self.finish)

    def _latency_ms(self, layouts: Sequence[LayerLayout]) -> float:
        assert self.latency is not None, "a latency budget comes with its table"
        if not all(layout.is_dense for layout in self.stored(layouts)):
            raise BudgetError(
                "--max-latency-ms is for recipes that only make FFNs narrower: this one also stores them in "
                "other forms, for which the table has no times"
            )
        return self.latency.mean_ms([layout.num_neurons for layout in layouts])

    def solve(self, budget: Budget, *, profile: Sequence[float] | None = None) -> Layouts:
        """The largest layouts within a budget.

        Each layer keeps the same fraction, or a fraction in proportion to `profile`. Raises BudgetError,
        with the smallest limit that can be met.
        """
        if budget.kind == "keep" and profile is None:
            layouts = uniform_layouts(
                self.model.shapes,
                keep=budget.limit,
                heavy=self.heavy,
                steps=self.steps,
                num_energetic=self.num_energetic,
            )
            return self._in_equal_shares(layouts)
        weights = profile or [1.0] * len(self.model.shapes)
        most = math.ceil(self.model.ffn_elements / min(weights)) + 1
        smallest = last_true(lambda size: self._scaled(size, weights) is None, first=0, last=most) + 1
        narrowest = self._scaled(smallest, weights)
        if narrowest is None or not self._meets(budget, narrowest):
            least = "none" if narrowest is None else _rounded_up(budget, self.cost(budget, narrowest))
            rest = " and the rest of the model" if budget.kind in OF_THE_WHOLE_MODEL else ""
            rest += self._narrowest(budget)
            raise BudgetError(f"{budget} is too small for one neuron per FFN{rest}: the smallest is {least}")

        def holds(size: int) -> bool:
            scaled = self._scaled(size, weights)
            return scaled is not None and self._meets(budget, scaled)

        found = self._scaled(last_true(holds, first=smallest, last=most), weights)
        assert found is not None
        return found if profile is not None else self._in_equal_shares(found)

    def _in_equal_shares(self, layouts: Layouts) -> Layouts:
        """The same layouts without the differences of rounding. An energy rule's differences are meant."""
        return layouts if self.heavy.by == "energy" else in_equal_shares(layouts, self.model)

    def _narrowest(self, budget: Budget) -> str:
        """For a latency budget, a note on the table's narrowest width, which limits how small it can be."""
        if budget.kind != "max_latency_ms" or self.latency is None:
            return ""
        width = self.latency.points[0].width
        return f" (FFNs narrower than {width:,} neurons were not timed, and count as {width:,})"

    def _meets(self, budget: Budget, layouts: Layouts) -> bool:
        if budget.kind == "keep":
            return self.model.elements_of(layouts) <= int(budget.limit * self.model.ffn_elements + 1e-9)
        return self.cost(budget, layouts) <= budget.limit

    def _scaled(self, num_elements: int, weights: Sequence[float]) -> Layouts | None:
        """Layouts of about `num_elements` in all, if every weight is 1; None if a layer does not fit."""
        counts = self.num_energetic or (1,) * len(weights)
        share = num_elements / self.model.ffn_elements
        made: dict[tuple[FFNShape, float, int], LayerLayout | None] = {}
        for shape, weight, count in zip(self.model.shapes, weights, counts, strict=True):
            if (shape, weight, count) in made:
                continue
            made[shape, weight, count] = fit_layer(
                shape,
                budget=element_budget(shape, share * weight),
                heavy=self.heavy,
                steps=self.steps,
                num_energetic=count,
            )
        layouts = [made[each] for each in zip(self.model.shapes, weights, counts, strict=True)]
        return tuple(each for each in layouts if each is not None) if all(layouts) else None


def in_equal_shares(layouts: Layouts, model: ModelShape) -> Layouts:
    """The layouts with FFNs narrowed, where one field of the config states their widths, by one fraction.

    Rounding gives FFNs of different widths slightly different fractions, and the field can state only one:
    the smallest. Layouts that are not merely narrower stay as they are.
    """
    if not is_narrowed_form(layouts, model.shapes):
        return layouts
    groups = model.width_groups or (0,) * len(layouts)
    equal = list(layouts)
    for group in set(groups) - {-1}:
        members = [index for index, each in enumerate(groups) if each == group]
        unit = min(model.shapes[index].num_neurons for index in members)  # the field's own value
        value = min(layouts[index].num_neurons * unit // model.shapes[index].num_neurons for index in members)
        multiple = max(model.shapes[index].width_multiple for index in members)
        value -= value % multiple if value < unit else 0
        for index in members if value else ():
            equal[index] = _narrowed(layouts[index], value * model.shapes[index].num_neurons // unit)
    return tuple(equal)


def _narrowed(layout: LayerLayout, width: int) -> LayerLayout:
    """A dense layout without the last of its neurons: light ones before heavy hitters."""
    heavy = 0 if layout.heavy is None else min(width, layout.heavy.num_neurons)
    widths = {"heavy": heavy, "light": width - heavy}
    parts = {
        name: part.model_copy(update={"num_neurons": widths[name]}) if part and widths[name] else None
        for name, part in (("heavy", layout.heavy), ("light", layout.light))
    }
    return layout.model_copy(update=parts)


def stored_layouts(
    layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape], *, finish: Compressor | None
) -> Layouts:
    """The layouts in the recipe's final checkpoint, from those that the steps leave."""
    if finish is None:
        return tuple(layouts)
    stored = []
    for layout, shape in zip(layouts, shapes, strict=True):
        whole = layout.folded
        finished = finish.plan(whole, shape=shape, budget=whole.num_elements(shape))
        assert finished is not None, "what a recipe ends with keeps every element"
        stored.append(finished)
    return tuple(stored)


def _rounded_up(budget: Budget, least: float) -> str:
    """A limit rounded up to few digits, in decimal: rounding binary fractions could end below the limit."""
    step = {"max_latency_ms": "0.001", "keep": "0.000001"}.get(budget.kind, "1")
    return str(Decimal(least).quantize(Decimal(step), ROUND_CEILING))


UNIFORM, SENSITIVITY = "uniform", "sensitivity"
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
