"""From a budget of elements to the layout of every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ffsplit.errors import BudgetError
from ffsplit.ffn import FFNShape, LayerLayout, PartLayout
from ffsplit.splitting.heavy import HeavyRule

if TYPE_CHECKING:
    from ffsplit.compressors.base import Compressor


def fit_layer(
    shape: FFNShape,
    *,
    budget: int,
    heavy: HeavyRule,
    steps: Sequence[Compressor],
    num_energetic: int = 1,
) -> LayerLayout | None:
    """The layout of one layer in at most `budget` elements, or None where there is none.

    Heavy hitters are as many as `heavy` asks for, and fewer where the rest would not fit beside
    them; they are kept dense, and the steps shrink the rest.
    """
    if budget >= shape.num_elements:
        return LayerLayout.dense(shape)
    adds_bias = not shape.down_bias and any(step.adds_down_bias for step in steps)
    for_ffn = budget - shape.hidden_size * adds_bias
    wanted = min(
        heavy.num_wanted(shape, budget=for_ffn, num_energetic=num_energetic),
        (for_ffn - shape.hidden_size * shape.down_bias) // shape.elements_per_neuron,
    )
    fewest = 1 if heavy.value > 0 else 0
    if wanted < fewest:
        return None

    def planned(width: int) -> LayerLayout | None:
        return _planned(shape, width=width, budget=budget, steps=steps)

    layout = planned(wanted)
    if layout is not None or planned(fewest) is None:
        return layout
    return planned(last_true(lambda width: planned(width) is not None, first=fewest, last=wanted))


def _planned(shape: FFNShape, *, width: int, budget: int, steps: Sequence[Compressor]) -> LayerLayout | None:
    """The layout with `width` heavy hitters, None where the steps cannot fit the rest."""
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


def fit_layers(
    shapes: Sequence[FFNShape],
    *,
    keep: float,
    heavy: HeavyRule,
    steps: Sequence[Compressor],
    num_energetic: Sequence[int] | None = None,
) -> tuple[LayerLayout, ...]:
    """The same fraction of every layer: one common width where the layers have one shape.

    `num_energetic`, a number a layer, is what a rule by energy goes by. Raises BudgetError, which
    says the smallest `keep` that works, when a layer cannot be made so small.
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
                f"--keep {keep:g} is too small for one neuron an FFN: the smallest is {smallest:.6f}"
            )
        layouts.append(layout)
    return tuple(layouts)


def element_budget(shape: FFNShape, keep: float) -> int:
    """The elements that a fraction of a layer comes to."""
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
    """The largest number below `last` for which `holds`, where it holds at `first` and then no more."""
    low, high = first, last
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
