"""From a budget of any kind to the layout of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from functools import partial
from typing import TYPE_CHECKING

from ffsplit.config import Budget
from ffsplit.errors import BudgetError, ConfigError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, ModelShape, is_narrowed_form
from ffsplit.splitting.latency import LatencyTable
from ffsplit.splitting.layer import (
    HeavyRule,
    element_budget,
    fit_layer,
    last_true,
    least_in_words,
    uniform_layouts,
)

if TYPE_CHECKING:
    from ffsplit.compressors.base import Compressor

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
    Widths and ranks are multiples of `multiple`, or as `rounded_down` says for None.
    """

    model: ModelShape
    heavy: HeavyRule
    steps: Sequence[Compressor]
    finish: Compressor | None = None
    latency: LatencyTable | None = None
    num_energetic: tuple[int, ...] | None = None
    expert_share: float = 0.0
    multiple: int | None = None

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
        return stored_layouts(layouts, self.model.shapes, finish=self.finish, multiple=self.multiple)

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
                multiple=self.multiple,
            )
            return self._in_equal_shares(layouts)
        found = self._largest(budget, profile or [1.0] * len(self.model.shapes))
        return found if profile is not None else self._in_equal_shares(found)

    @property
    def unrounded(self) -> Solver:
        """The solver that uses the whole budget, whatever the widths."""
        return replace(self, multiple=1)

    def _largest(self, budget: Budget, weights: Sequence[float]) -> Layouts:
        """The largest layouts within a budget, of which each layer gets a share in proportion to its weight.

        Widths are rounded to near multiples last. Otherwise the search would rather take a worse multiple
        that uses more of the budget.
        """
        exact = self if self.multiple is not None else self.unrounded
        size, smallest, found = exact._largest_size(budget, weights)
        if exact is self:
            return found
        rounded = self._within(budget, size, weights)
        if rounded is None:  # another division into parts may take more bytes
            size = last_true(partial(self._holds, budget, weights), first=smallest, last=size)
            rounded = self._within(budget, size, weights)
        return rounded or found

    def _holds(self, budget: Budget, weights: Sequence[float], num_elements: int) -> bool:
        return self._within(budget, num_elements, weights) is not None

    def _within(self, budget: Budget, num_elements: int, weights: Sequence[float]) -> Layouts | None:
        """The layouts of `_scaled`, if there are any and they are within the budget."""
        layouts = self._scaled(num_elements, weights)
        return layouts if layouts is not None and self.meets(budget, layouts) else None

    def _largest_size(self, budget: Budget, weights: Sequence[float]) -> tuple[int, int, Layouts]:
        """The largest and the smallest size that the budget allows `_scaled`, and the largest's layouts."""
        most = math.ceil(self.model.ffn_elements / min(weights)) + 1
        smallest = last_true(lambda size: self._scaled(size, weights) is None, first=0, last=most) + 1
        narrowest = self._scaled(smallest, weights)
        if narrowest is None or not self.meets(budget, narrowest):
            least = "none" if narrowest is None else _rounded_up(budget, self.cost(budget, narrowest))
            rest = " and the rest of the model" if budget.kind in OF_THE_WHOLE_MODEL else ""
            rest += self._narrowest(budget)
            raise BudgetError(f"{budget} is too small for {self._least}{rest}: the smallest is {least}")

        size = last_true(partial(self._holds, budget, weights), first=smallest, last=most)
        found = self._scaled(size, weights)
        assert found is not None
        return size, smallest, found

    def _in_equal_shares(self, layouts: Layouts) -> Layouts:
        """The same layouts without the differences of rounding. An energy rule's differences are meant."""
        if self.heavy.by == "energy":
            return layouts
        return in_equal_shares(layouts, self.model, multiple=self.multiple)

    @property
    def _least(self) -> str:
        """What no budget can go below, in words."""
        mixture = self.model.mixture
        if not self.expert_share or mixture is None:
            return least_in_words(self.multiple)
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
                multiple=self.multiple,
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
            shape = shapes[first]
            layout: LayerLayout | None = LayerLayout.dense(shape)
            if kept < 1:
                budget = element_budget(shape, kept)
                layout = fit_layer(
                    shape, budget=budget, heavy=self.heavy, steps=self.steps, multiple=self.multiple
                )
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


def checked_multiple(multiple: int | None, *, model: ModelShape) -> int | None:
    """The multiple of widths and ranks. Raises ConfigError if an FFN has fewer neurons."""
    smallest = min(shape.num_neurons for shape in model.shapes)
    if multiple is not None and multiple > smallest:
        raise ConfigError(
            f"--width-multiple {multiple} is more than an FFN has: give at most its {smallest:,} neurons"
        )
    return multiple


def in_equal_shares(layouts: Layouts, model: ModelShape, *, multiple: int | None = None) -> Layouts:
    """The layouts with FFNs narrowed, where one field of the config states their widths, by one fraction.

    Rounding gives FFNs of different widths slightly different fractions, and the field can state only one:
    the smallest, of which all widths are multiples of `multiple`. Layouts that are not merely narrower stay
    as they are.
    """
    if not is_narrowed_form(layouts, model.shapes):
        return layouts
    groups = model.width_groups or (0,) * len(layouts)
    equal = list(layouts)
    for group in set(groups) - {-1}:
        members = [index for index, each in enumerate(groups) if each == group]
        unit = min(model.shapes[index].num_neurons for index in members)  # the field's own value
        value = min(layouts[index].num_neurons * unit // model.shapes[index].num_neurons for index in members)
        kernels = max(model.shapes[index].width_multiple for index in members)
        value -= value % kernels if value < unit else 0
        widths = {model.shapes[index].num_neurons for index in members}
        while value > 0 and any(value * width // unit % (multiple or 1) for width in widths):
            value -= kernels
        for index in members if value > 0 else ():
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
    layouts: Sequence[LayerLayout],
    shapes: Sequence[FFNShape],
    *,
    finish: Compressor | None,
    multiple: int | None = None,
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
        finished = finish.plan(whole, shape=shape, budget=whole.num_elements(shape), multiple=multiple)
        assert finished is not None, "what a recipe ends with keeps every element"
        stored.append(finished)
    return tuple(stored)


def _rounded_up(budget: Budget, least: float) -> str:
    """A limit rounded up to few digits, in decimal: rounding binary fractions could end below the limit."""
    step = {"max_latency_ms": "0.001", "keep": "0.000001"}.get(budget.kind, "1")
    return str(Decimal(least).quantize(Decimal(step), ROUND_CEILING))
