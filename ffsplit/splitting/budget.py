"""From a budget of elements to the layout of every layer."""

from __future__ import annotations

from collections.abc import Sequence

from ffsplit.compressors.base import Compressor
from ffsplit.errors import BudgetError
from ffsplit.ffn import FFNShape, LayerLayout, PartLayout

WIDTH_MULTIPLES = (64, 32, 16, 8)
MAX_LOSS_TO_ROUNDING = 0.02


def rounded_width(width: int, *, elements_per_neuron: int, budget: int) -> int:
    """Round down to the largest multiple of 64, 32, 16 or 8 that gives up under 2 % of the budget.

    Kernels like such widths. Where no multiple is that close, the width is left as it is.
    """
    for multiple in WIDTH_MULTIPLES:
        rounded = width // multiple * multiple
        if rounded > 0 and (width - rounded) * elements_per_neuron < MAX_LOSS_TO_ROUNDING * budget:
            return rounded
    return width


def fit_layer(
    shape: FFNShape, *, budget: int, heavy_share: float, steps: Sequence[Compressor]
) -> LayerLayout | None:
    """The layout of one layer in at most `budget` elements, or None where there is none.

    `heavy_share` of the budget goes to heavy hitters, kept dense; the steps shrink the rest.
    """
    if budget >= shape.num_elements:
        return LayerLayout.dense(shape)
    has_bias = shape.down_bias or any(step.adds_down_bias for step in steps)
    for_neurons = budget - shape.hidden_size * has_bias
    width = max(0, int(heavy_share * for_neurons)) // shape.elements_per_neuron
    if heavy_share > 0:
        if width == 0:
            return None
        width = rounded_width(width, elements_per_neuron=shape.elements_per_neuron, budget=budget)
    fewest = 1 if heavy_share > 0 else 0
    for fewer in range(width, fewest - 1, -1):  # near the smallest budget the rest may not fit beside them
        layout = _planned(shape, width=fewer, budget=budget, steps=steps)
        if layout is not None:
            return layout
    return None


def _planned(shape: FFNShape, *, width: int, budget: int, steps: Sequence[Compressor]) -> LayerLayout | None:
    """The layout with `width` heavy hitters, None where the steps cannot fit the rest."""
    layout: LayerLayout | None = LayerLayout(
        heavy=PartLayout.dense(shape, width) if width else None,
        light=PartLayout.dense(shape, shape.num_neurons - width),
        down_bias=shape.down_bias,
    )
    for step in steps:
        if layout is not None:
            layout = step.plan(layout, shape=shape, budget=budget)
    if layout is None or layout.num_elements(shape) > budget:
        return None
    return layout


def fit_layers(
    shapes: Sequence[FFNShape], *, keep: float, heavy_share: float, steps: Sequence[Compressor]
) -> tuple[LayerLayout, ...]:
    """The same fraction of every layer: one common width where the layers have one shape.

    Raises BudgetError, which says the smallest `keep` that works, when a layer cannot be made so small.
    """
    layouts = []
    for shape in shapes:
        budget = int(keep * shape.num_elements + 1e-9)
        layout = fit_layer(shape, budget=budget, heavy_share=heavy_share, steps=steps)
        if layout is None:
            smallest = max(
                smallest_keep(each, heavy_share=heavy_share, steps=steps) for each in set_of(shapes)
            )
            raise BudgetError(
                f"--keep {keep:g} is too small for one neuron a layer: the smallest is {smallest:.6f}"
            )
        layouts.append(layout)
    return tuple(layouts)


def set_of(shapes: Sequence[FFNShape]) -> list[FFNShape]:
    """Each shape once."""
    return list(dict.fromkeys(shapes))


def smallest_keep(shape: FFNShape, *, heavy_share: float, steps: Sequence[Compressor]) -> float:
    """The smallest fraction at which `fit_layer` succeeds, rounded up to six decimals."""
    low, high = 0, shape.num_elements
    while low + 1 < high:
        middle = (low + high) // 2
        fits = fit_layer(shape, budget=middle, heavy_share=heavy_share, steps=steps) is not None
        low, high = (low, middle) if fits else (middle, high)
    return -(-high * 1_000_000 // shape.num_elements) / 1_000_000
