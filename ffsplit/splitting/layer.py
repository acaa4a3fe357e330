"""From a number of elements to the layout of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ffsplit.config import Record
from ffsplit.errors import BudgetError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, PartLayout, rounded_down

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
            return max(1, int(self.value * shape.num_neurons + 1e-9))
        for_neurons = budget - shape.hidden_size * shape.down_bias
        return max(0, int(self.value * for_neurons)) // shape.elements_per_neuron


def fit_layer(
    shape: FFNShape,
    *,
    budget: int,
    heavy: HeavyRule,
    steps: Sequence[Compressor],
    num_energetic: int = 1,
    multiple: int | None = None,
) -> LayerLayout | None:
    """The layout of one layer in at most `budget` elements, or None if none fits.

    There are as many heavy hitters as `heavy` asks for, or fewer if the rest would not fit beside them. They
    are kept dense; the steps shrink the rest. Widths and ranks are rounded down as `rounded_down` says.
    """
    if budget >= shape.num_elements and shape.num_neurons % (multiple or 1) == 0:
        return LayerLayout.dense(shape)
    budget = min(budget, shape.num_elements)
    adds_bias = not shape.down_bias and any(step.adds_down_bias for step in steps)
    for_ffn = budget - shape.hidden_size * adds_bias
    wanted = min(
        heavy.num_wanted(shape, budget=for_ffn, num_energetic=num_energetic),
        (for_ffn - shape.hidden_size * shape.down_bias) // shape.elements_per_neuron,
    )

    def planned(width: int) -> LayerLayout | None:
        return _planned(shape, width=width, budget=budget, steps=steps, multiple=multiple)

    narrowest = planned(shape.width_multiple) if shape.width_multiple < shape.num_neurons else None
    kernels = shape.width_multiple if narrowest is not None and narrowest.is_dense else 1
    unit = math.lcm(kernels, multiple or 1)

    def rounded(width: int) -> int:
        cost, whole = shape.elements_per_neuron, shape.num_elements
        width = rounded_down(width, multiple=multiple, cost=cost, whole=whole)
        return width - width % unit

    fewest = unit if heavy.value > 0 else 0
    wanted = max(rounded(wanted), fewest if heavy.by == "energy" else 0)
    if wanted < fewest or fewest >= shape.num_neurons:
        return None
    layout = planned(wanted)
    if layout is not None or planned(fewest) is None:
        return layout
    most = last_true(lambda width: planned(width) is not None, first=fewest, last=wanted)
    return planned(max(fewest, rounded(most)))


def _planned(
    shape: FFNShape, *, width: int, budget: int, steps: Sequence[Compressor], multiple: int | None
) -> LayerLayout | None:
    """The layout with `width` heavy hitters; None if the steps cannot fit the rest."""
    assert width < shape.num_neurons, "a budget below the whole FFN leaves a neuron out"
    layout = LayerLayout(
        heavy=PartLayout.dense(shape, width) if width else None,
        light=PartLayout.dense(shape, shape.num_neurons - width),
        down_bias=shape.down_bias,
    )
    for step in steps:
        planned = step.plan(layout, shape=shape, budget=budget, multiple=multiple)
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
    multiple: int | None = None,
) -> tuple[LayerLayout, ...]:
    """Keep the same fraction of every layer: one common width if all layers have one shape.

    `num_energetic`, one number per layer, is for an energy rule; `multiple` is for `rounded_down`. Raises
    BudgetError, with the smallest `keep` that works, when a layer cannot be made so small.
    """
    counts = num_energetic or [1] * len(shapes)
    layouts = []
    for shape, count in zip(shapes, counts, strict=True):
        budget = element_budget(shape, keep)
        layout = fit_layer(
            shape, budget=budget, heavy=heavy, steps=steps, num_energetic=count, multiple=multiple
        )
        if layout is None:
            smallest = max(
                smallest_keep(each, heavy=heavy, steps=steps, multiple=multiple) for each in set_of(shapes)
            )
            if smallest >= 1:
                within = "" if multiple is None else f" in multiples of {multiple:,}"
                raise BudgetError(
                    f"--keep {keep:g} cannot be met: the recipe's steps make no FFN smaller{within}"
                )
            raise BudgetError(
                f"--keep {keep:g} is too small for {least_in_words(multiple)}: the smallest is {smallest:.6f}"
            )
        layouts.append(layout)
    return tuple(layouts)


def least_in_words(multiple: int | None) -> str:
    """What no budget can go below."""
    if multiple is None or multiple == 1:
        return "one neuron per FFN"
    return f"widths and ranks in multiples of {multiple:,}"


def element_budget(shape: FFNShape, keep: float) -> int:
    """The number of elements in a fraction of a layer."""
    return int(keep * shape.num_elements + 1e-9)


def set_of(shapes: Sequence[FFNShape]) -> list[FFNShape]:
    """Each shape once."""
    return list(dict.fromkeys(shapes))


def smallest_keep(
    shape: FFNShape, *, heavy: HeavyRule, steps: Sequence[Compressor], multiple: int | None = None
) -> float:
    """The smallest fraction at which `fit_layer` succeeds, rounded up to six decimals."""

    def too_small(budget: int) -> bool:
        return fit_layer(shape, budget=budget, heavy=heavy, steps=steps, multiple=multiple) is None

    high = last_true(too_small, first=0, last=shape.num_elements) + 1
    return -(-high * 1_000_000 // shape.num_elements) / 1_000_000


def last_true(holds: Callable[[int], bool], *, first: int, last: int) -> int:
    """The largest number below `last` for which `holds` is true; from `first` on, it turns false once."""
    low, high = first, last
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
