"""The best widths are those of all combinations, stay within the budget, and are uniform for equal layers."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from ffsplit.compressors import PruneCompressor
from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, ModelShape
from ffsplit.splitting.knapsack import (
    Curve,
    WidthTable,
    best_layouts,
    best_order,
    curve_of,
    measured_widths,
    nearest_measured,
    width_step,
)
from ffsplit.splitting.layer import HeavyRule
from ffsplit.splitting.proposal import TABLES, propose_widths
from ffsplit.splitting.solver import Solver


def shape_of(num_neurons: int = 64, hidden_size: int = 16) -> FFNShape:
    return FFNShape(
        num_neurons=num_neurons, hidden_size=hidden_size, gated=True, up_bias=False, down_bias=False
    )


def solver_of(*shapes: FFNShape) -> Solver:
    elements = sum(shape.num_elements for shape in shapes)
    model = ModelShape(
        shapes=shapes,
        itemsize=4,
        num_parameters=elements + 1000,
        num_parameters_without_embeddings=elements + 500,
    )
    return Solver(model=model, heavy=HeavyRule(by="share", value=1), steps=(PruneCompressor(),))


def random_curve(generator: random.Random, *, whole: int = 64, step: int = 8) -> Curve:
    widths = tuple(range(step, whole + 1, step))
    errors = sorted((generator.random() ** 3 for _ in widths[1:]), reverse=True)
    return curve_of(WidthTable(widths, (*errors, 0.0)), step=step)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.83])
def test_no_other_widths_within_the_budget_have_a_smaller_sum_of_errors(seed: int, keep: float) -> None:
    generator, solver = random.Random(seed), solver_of(*[shape_of()] * 3)
    curves, budget = [random_curve(generator) for _ in range(3)], Budget(kind="keep", limit=keep)
    found = best_layouts(solver, budget, curves)
    assert solver.meets(budget, found)

    def error_of(widths: tuple[int, ...]) -> float:
        return sum(
            float(curve.errors[curve.widths.index(width)])
            for curve, width in zip(curves, widths, strict=True)
        )

    every = product(*(curve.widths for curve in curves))
    within = [each for each in every if sum(each) <= keep * 3 * 64]
    ours = error_of(tuple(layout.num_neurons for layout in found))
    assert ours == pytest.approx(min(map(error_of, within)), abs=1e-12)


BUDGETS = [
    Budget(kind="keep", limit=0.4),
    Budget(kind="max_bytes", limit=30_000),
    Budget(kind="max_parameters", limit=9_000),
]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_of_any_kind_is_used_and_never_exceeded(budget: Budget) -> None:
    """Layers of different sizes too."""
    generator = random.Random(1)
    shapes = (shape_of(), shape_of(), shape_of(96, 24), shape_of(96, 24))
    solver = solver_of(*shapes)
    curves = [random_curve(generator, whole=shape.num_neurons) for shape in shapes]
    found = best_layouts(solver, budget, curves)
    assert 0.85 * budget.limit < solver.cost(budget, found) <= budget.limit
    for layout, curve in zip(found, curves, strict=True):
        assert layout.num_neurons in curve.widths


def test_what_the_narrowest_widths_exceed_is_refused() -> None:
    solver, curves = solver_of(*[shape_of()] * 2), [random_curve(random.Random(0))] * 2
    with pytest.raises(BudgetError, match="below the narrowest"):
        best_layouts(solver, Budget(kind="keep", limit=0.1), curves)
    budget = Budget(kind="keep", limit=0.1)
    assert propose_widths(solver, budget, curves, uniform=solver.solve(budget)) is None


@pytest.mark.parametrize("errors", [(0.3, 0.1, 0.02, 0.0), (0.0, 0.0, 0.0, 0.0), (0.3, 0.2, 0.1, 0.0)])
def test_equal_tables_give_equal_widths(errors: tuple[float, ...]) -> None:
    solver, budget = solver_of(*[shape_of()] * 4), Budget(kind="keep", limit=0.5)
    curves = [curve_of(WidthTable((8, 24, 40, 64), errors), step=8)] * 4
    assert {each.num_neurons for each in best_layouts(solver, budget, curves)} == {32}
    uniform = tuple(LayerLayout.dense(shape_of(), 32) for _ in range(4))
    assert propose_widths(solver, budget, curves, uniform=uniform) is None


def test_a_layer_that_matters_more_gets_more() -> None:
    solver, budget = solver_of(*[shape_of()] * 2), Budget(kind="keep", limit=0.5)
    curves = [
        curve_of(WidthTable((8, 32, 64), (2.0 * size, 0.5 * size, 0.0)), step=8) for size in (1.0, 0.05)
    ]
    found = propose_widths(solver, budget, curves, uniform=solver.solve(budget))
    assert found is not None and found.name == TABLES
    first, second = (each.num_neurons for each in found.layouts)
    assert first > 32 > second and first + second == 64


def test_a_curve_goes_through_convex_tables_and_below_others() -> None:
    table = WidthTable((8, 24, 40, 64), (0.9, 0.4, 0.1, 0.0))
    curve = curve_of(table, step=8)
    assert curve.widths == (8, 16, 24, 32, 40, 48, 56, 64)
    for width, error in zip(*table, strict=True):
        assert curve.errors[curve.widths.index(width)] == pytest.approx(error)
    bumpy = curve_of(WidthTable((8, 24, 40, 64), (0.5, 0.4, 0.45, 0.05)), step=8)
    steps = np.diff(bumpy.errors)
    assert (steps <= 1e-12).all() and (np.diff(steps) >= -1e-12).all(), "convex, and no wider one is worse"
    assert bumpy.errors[-1] == 0 and bumpy.errors[0] == pytest.approx(0.45)
    assert bumpy.errors[2] <= 0.4 - 0.05 + 1e-12


def test_between_measured_widths_the_root_changes_evenly() -> None:
    curve = curve_of(WidthTable((16, 48), (0.64, 0.0)), step=16)
    assert curve.errors == pytest.approx([0.64, 0.16, 0.0])


def test_a_whole_ffn_is_no_choice_if_the_multiple_does_not_divide_it() -> None:
    table = WidthTable((20, 40, 64), (0.5, 0.1, 0.0))
    assert curve_of(table, step=20, multiple=20).widths == (20, 40, 60)
    assert curve_of(table, step=20).widths == (20, 40, 60, 64)
    whole = WidthTable((16, 32, 64), (0.5, 0.1, 0.0))
    assert curve_of(whole, step=16, multiple=16).widths == (16, 32, 48, 64)
    for given, multiple in ((table, 20), (whole, 16)):
        curve = curve_of(given, step=multiple, multiple=multiple)
        assert len(curve.errors) == len(curve.widths)
        assert curve.errors[:2] == pytest.approx(list(given.errors[:2]))


def test_steps_of_one_layer_keep_their_order() -> None:
    curves = [random_curve(random.Random(seed)) for seed in range(3)]
    order = best_order(curves, costs=[1, 1, 1])
    assert sorted(order) == sorted(layer for layer in range(3) for _ in curves[layer].widths[1:])
    dear = best_order(curves[:1] * 2, costs=[1, 3])
    assert dear.index(0) < dear.index(1), "for the same error the cheaper neurons come first"


@pytest.mark.parametrize(
    ("num_neurons", "step"), [(11008, 64), (1536, 64), (1023, 32), (256, 16), (128, 8), (48, 1)]
)
def test_widths_are_multiples_that_kernels_like(num_neurons: int, step: int) -> None:
    shape = shape_of(num_neurons)
    assert width_step(shape) == step
    for kept in (0.05, 0.3535, 0.8, 1.0):
        widths = measured_widths(shape, kept=kept)
        assert widths == tuple(sorted(set(widths))) and widths[-1] == num_neurons
        assert all(width % step == 0 for width in widths[:-1]) and widths[0] >= step
        (coarse,) = [measured_widths(shape, kept=kept, multiple=24)]
        assert width_step(shape, multiple=24) == 24 and coarse[-1] == num_neurons
        assert all(width % 24 == 0 for width in coarse[:-1])
    assert len(measured_widths(shape_of(1536), kept=0.5)) == 7
    assert min(abs(width - 768) for width in measured_widths(shape_of(1536), kept=0.5)) == 0


def test_the_nearest_measured_width_is_found() -> None:
    layouts = tuple(LayerLayout.dense(shape_of(), width) for width in (10, 16, 60))
    tables = [WidthTable((8, 24, 64), (1.0, 0.5, 0.0))] * 3
    assert nearest_measured(layouts, tables) == (8, 8, 64)
