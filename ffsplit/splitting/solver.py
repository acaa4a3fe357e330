"""From a budget of any kind to the layout of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING

from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.ffn import FFNShape, LayerLayout, ModelShape
from ffsplit.splitting.budget import element_budget, fit_layer, fit_layers, last_true
from ffsplit.splitting.heavy import HeavyRule
from ffsplit.splitting.latency import LatencyTable

if TYPE_CHECKING:
    from ffsplit.compressors.base import Compressor

Layouts = tuple[LayerLayout, ...]
OF_THE_WHOLE_MODEL = ("max_parameters", "max_latency_ms")
"""Budgets of which the FFNs have what the rest of the model leaves. The others limit FFNs alone."""


@dataclass(frozen=True)
class Solver:
    """Knows a model and a recipe, and finds the largest layouts that a budget allows.

    `finish` is what a recipe ends with, once the layers are what the steps make of them: it stores the
    same elements in fewer bytes. `latency` is for budgets in milliseconds; `num_energetic`, a number a
    layer, for heavy hitters by energy. Without the latter their rule counts as one neuron a layer, the
    least it can ask for.
    """

    model: ModelShape
    heavy: HeavyRule
    steps: Sequence[Compressor]
    finish: Compressor | None = None
    latency: LatencyTable | None = None
    num_energetic: tuple[int, ...] | None = None

    def cost(self, budget: Budget, layouts: Sequence[LayerLayout]) -> float:
        """What these layouts take of what the budget limits, in its units."""
        if budget.kind == "max_bytes":
            return self.model.bytes_of(self.stored(layouts))
        if budget.kind == "max_parameters":
            return self.model.parameters_of(layouts)
        if budget.kind == "max_latency_ms":
            return self._latency_ms(layouts)
        return self.model.elements_of(layouts) / self.model.ffn_elements

    def stored(self, layouts: Sequence[LayerLayout]) -> Layouts:
        """The layouts in the form that a result has in the end."""
        return stored_layouts(layouts, self.model.shapes, finish=self.finish)

    def _latency_ms(self, layouts: Sequence[LayerLayout]) -> float:
        assert self.latency is not None, "a latency budget comes with its table"
        if not all(layout.is_dense for layout in self.stored(layouts)):
            raise BudgetError(
                "--max-latency-ms is for recipes that make FFNs narrower: this one also stores them in "
                "other forms, whose times the table does not hold"
            )
        return self.latency.mean_ms([layout.num_neurons for layout in layouts])

    def solve(self, budget: Budget, *, profile: Sequence[float] | None = None) -> Layouts:
        """The largest layouts within a budget.

        The layers keep the same fraction each, or fractions in proportion to `profile`. Raises
        BudgetError, which says the smallest limit that can be met.
        """
        if budget.kind == "keep" and profile is None:
            return fit_layers(
                self.model.shapes,
                keep=budget.limit,
                heavy=self.heavy,
                steps=self.steps,
                num_energetic=self.num_energetic,
            )
        weights = profile or [1.0] * len(self.model.shapes)
        most = math.ceil(self.model.ffn_elements / min(weights)) + 1
        smallest = last_true(lambda size: self._scaled(size, weights) is None, first=0, last=most) + 1
        layouts = self._scaled(smallest, weights)
        if layouts is None or not self._meets(budget, layouts):
            least = "none" if layouts is None else _rounded_up(budget, self.cost(budget, layouts))
            rest = " and the rest of the model" if budget.kind in OF_THE_WHOLE_MODEL else ""
            rest += self._narrowest(budget)
            raise BudgetError(f"{budget} is too small for one neuron an FFN{rest}: the smallest is {least}")

        def holds(size: int) -> bool:
            scaled = self._scaled(size, weights)
            return scaled is not None and self._meets(budget, scaled)

        found = self._scaled(last_true(holds, first=smallest, last=most), weights)
        assert found is not None
        return found

    def _narrowest(self, budget: Budget) -> str:
        """Of a latency's least it depends on the table too, which knows nothing narrower."""
        if budget.kind != "max_latency_ms" or self.latency is None:
            return ""
        width = self.latency.points[0].width
        return f" (FFNs narrower than {width:,} neurons were not timed, and count as {width:,})"

    def _meets(self, budget: Budget, layouts: Layouts) -> bool:
        if budget.kind == "keep":
            return self.model.elements_of(layouts) <= int(budget.limit * self.model.ffn_elements + 1e-9)
        return self.cost(budget, layouts) <= budget.limit

    def _scaled(self, num_elements: int, weights: Sequence[float]) -> Layouts | None:
        """Layouts of about `num_elements` in all where every weight is 1; None where one has no room."""
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


def stored_layouts(
    layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape], *, finish: Compressor | None
) -> Layouts:
    """What becomes of the layouts that the steps leave, in the checkpoint that a recipe ends with."""
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
    """A limit in few digits that is met: binary fractions times a power of ten may round below it."""
    step = {"max_latency_ms": "0.001", "keep": "0.000001"}.get(budget.kind, "1")
    return str(Decimal(least).quantize(Decimal(step), ROUND_CEILING))
