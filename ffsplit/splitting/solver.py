"""From a budget of any kind to the layout of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Literal

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
    without it, that rule counts as one neuron per layer, the least it can ask for. `expert_share` of the
    saving is made by dropping whole experts, if it is not 0; FFNs that see every token then stay whole.
    """

    model: ModelShape
    heavy: HeavyRule
    steps: Sequence[Compressor]
    finish: Compressor | None = None
    latency: LatencyTable | None = None
    num_energetic: tuple[int, ...] | None = None
    expert_share: float = 0.0

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
        if budget.kind == "keep" and profile is None and not self.expert_share:
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
        if narrowest is None or not self.meets(budget, narrowest):
            least = "none" if narrowest is None else _rounded_up(budget, self.cost(budget, narrowest))
            rest = " and the rest of the model" if budget.kind in OF_THE_WHOLE_MODEL else ""
            rest += self._narrowest(budget)
            raise BudgetError(f"{budget} is too small for {self._least}{rest}: the smallest is {least}")

        def holds(size: int) -> bool:
            scaled = self._scaled(size, weights)
            return scaled is not None and self.meets(budget, scaled)

        found = self._scaled(last_true(holds, first=smallest, last=most), weights)
        assert found is not None
        return found if profile is not None else self._in_equal_shares(found)

    def _in_equal_shares(self, layouts: Layouts) -> Layouts:
        """The same layouts without the differences of rounding. An energy rule's differences are meant."""
        return layouts if self.heavy.by == "energy" else in_equal_shares(layouts, self.model)

    @property
    def _least(self) -> str:
        """What no budget can go below, in words."""
        mixture = self.model.mixture
        if not self.expert_share or mixture is None:
            return "one neuron per FFN"
        return f"the {mixture.fewest} of {mixture.num_experts} experts per block that the router needs"

    def _narrowest(self, budget: Budget) -> str:
        """For a latency budget, a note on the table's narrowest width, which limits how small it can be."""
        if budget.kind != "max_latency_ms" or self.latency is None:
            return ""
        width = self.latency.points[0].width
        return f" (FFNs narrower than {width:,} neurons were not timed, and count as {width:,})"

    def meets(self, budget: Budget, layouts: Layouts) -> bool:
        """Whether these layouts are within a budget."""
        if budget.kind == "keep":
            return self.model.elements_of(layouts) <= int(budget.limit * self.model.ffn_elements + 1e-9)
        return self.cost(budget, layouts) <= budget.limit

    def _scaled(self, num_elements: int, weights: Sequence[float]) -> Layouts | None:
        """Layouts of about `num_elements` in all, if every weight is 1; None if a layer does not fit."""
        if self.expert_share:
            return self._with_dropped(num_elements)
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

    def _with_dropped(self, num_elements: int) -> Layouts | None:
        """Layouts of at most `num_elements` in all, of which experts alone are dropped or narrowed.

        Where no config can state a width of experts alone, those that are left stay whole. None if nothing
        fits. Of two numbers of experts, the one that wastes less to the rounding of widths is taken.
        """
        mixture = self.model.mixture
        assert mixture is not None, "experts are dropped from mixtures only"
        of_each = sum(self.model.shapes[first].num_elements for first in mixture.firsts)
        saved = self.model.ffn_elements - num_elements
        share = self.expert_share if self._can_narrow_experts else 1
        fewer, step = max(0, int(share * saved / of_each)) // mixture.num_groups, mixture.num_groups
        found = []
        for num_dropped in ((fewer + 1) * step, fewer * step):  # of equals, whole experts are dropped
            num_dropped = min(num_dropped, mixture.num_experts - mixture.fewest)
            left = (mixture.num_experts - num_dropped) * of_each
            kept = max(0.0, 1 - (saved - num_dropped * of_each) / left)
            if kept >= 1 or self._can_narrow_experts:
                found.append(self._dropping(num_dropped, kept=kept))
        return max((each for each in found if each), key=self.model.elements_of, default=None)

    def _dropping(self, num_dropped: int, *, kept: float) -> Layouts | None:
        """Layouts without some experts per block, of which the others keep a fraction; None if none fits.

        The last of each group count as dropped, until statistics tell which.
        """
        mixture, shapes = self.model.mixture, self.model.shapes
        assert mixture is not None
        in_group = mixture.num_experts // mixture.num_groups
        stays = in_group - num_dropped // mixture.num_groups
        layouts = [LayerLayout.dense(shape) for shape in shapes]
        for first in mixture.firsts:
            budget = element_budget(shapes[first], kept)
            layout = fit_layer(shapes[first], budget=budget, heavy=self.heavy, steps=self.steps)
            if layout is None:
                return None
            for position, index in enumerate(mixture.experts_of(first)):
                layouts[index] = layout if position % in_group < stays else LayerLayout.dropped()
        return tuple(layouts)

    @property
    def _can_narrow_experts(self) -> bool:
        """Whether config.json can state a width of the experts, and of nothing else."""
        mixture, groups = self.model.mixture, self.model.width_groups
        if mixture is None or groups is None:  # one width for all FFNs
            return mixture is not None and len(mixture.indices) == len(self.model.shapes)
        experts = {groups[index] for index in mixture.indices}
        others = {group for index, group in enumerate(groups) if index not in mixture.indices}
        return -1 not in experts and not experts & others


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
        if whole.is_dropped:
            stored.append(whole)
            continue
        finished = finish.plan(whole, shape=shape, budget=whole.num_elements(shape))
        assert finished is not None, "what a recipe ends with keeps every element"
        stored.append(finished)
    return tuple(stored)


def _rounded_up(budget: Budget, least: float) -> str:
    """A limit rounded up to few digits, in decimal: rounding binary fractions could end below the limit."""
    step = {"max_latency_ms": "0.001", "keep": "0.000001"}.get(budget.kind, "1")
    return str(Decimal(least).quantize(Decimal(step), ROUND_CEILING))
