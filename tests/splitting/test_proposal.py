"""A proposal spends the same budget, and more of it where an error is larger."""

from __future__ import annotations

import math

import pytest

from ffsplit.compressors import PruneCompressor
from ffsplit.config import Budget
from ffsplit.ffn.shapes import FFNShape, ModelShape
from ffsplit.splitting.layer import HeavyRule
from ffsplit.splitting.proposal import (
    HALVING,
    SENSITIVITY,
    SMALLEST_WEIGHT,
    least_error_fractions,
    propose,
)
from ffsplit.splitting.solver import Solver

SHAPE = FFNShape(num_neurons=400, hidden_size=32, gated=False, up_bias=True, down_bias=True)
MODEL = ModelShape(
    shapes=(SHAPE,) * 3, itemsize=4, num_parameters=200_000, num_parameters_without_embeddings=100_000
)
SOLVER = Solver(model=MODEL, heavy=HeavyRule(by="share", value=1), steps=(PruneCompressor(),))
ERRORS = (0.04, 0.01, 0.0025)


@pytest.mark.parametrize("budget", [Budget(kind="keep", limit=0.4), Budget(kind="max_bytes", limit=90_000)])
def test_a_proposal_keeps_to_the_budget_and_uses_it(budget: Budget) -> None:
    found = propose(SOLVER, budget, ERRORS, uniform=SOLVER.solve(budget))
    assert found is not None and found.name == SENSITIVITY
    assert 0.9 * budget.limit < SOLVER.cost(budget, found.layouts) <= budget.limit
    widths = [layout.num_neurons for layout in found.layouts]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("errors", [(0.01,) * 3, (0.0,) * 3])
def test_layers_alike_are_as_the_uniform_ones(errors: tuple[float, ...]) -> None:
    budget = Budget(kind="keep", limit=0.5)
    uniform = SOLVER.solve(budget)
    found = propose(SOLVER, budget, errors, uniform=uniform)
    widths = [layout.num_neurons for layout in (found.layouts if found else uniform)]
    assert max(widths) - min(widths) <= 2


def test_four_times_the_error_is_worth_two_halvings() -> None:
    fractions = least_error_fractions(ERRORS, sizes=[1] * 3, kept=0.5)
    assert fractions == pytest.approx([0.5 + 2 * HALVING, 0.5, 0.5 - 2 * HALVING], abs=1e-6)


def test_an_element_goes_where_it_takes_away_the_most_error() -> None:
    """By the rule that every HALVING halves an error, no shift of elements makes the sum smaller."""
    errors, sizes = (0.03, 0.02, 0.004), (1.0, 2.0, 3.0)
    fractions = least_error_fractions(errors, sizes=[int(each) for each in sizes], kept=0.4)
    gains = [
        error * math.log(2) / HALVING * 2 ** (-fraction / HALVING) / size
        for error, fraction, size in zip(errors, fractions, sizes, strict=True)
    ]
    assert gains == pytest.approx([gains[0]] * 3, rel=1e-6)
    assert sum(f * s for f, s in zip(fractions, sizes, strict=True)) / sum(sizes) == pytest.approx(0.4)


@pytest.mark.parametrize("kept", [0.05, 0.3535, 0.9])
def test_no_layer_gets_all_or_nothing(kept: float) -> None:
    fractions = least_error_fractions((1.0, 1e-5, 0.0), sizes=[5] * 3, kept=kept)
    assert all(SMALLEST_WEIGHT * kept <= fraction <= 1 for fraction in fractions)
    assert fractions[0] >= fractions[1] >= fractions[2]
    assert sum(fractions) / 3 == pytest.approx(kept, rel=1e-3)


def test_a_budget_that_leaves_no_choice_gives_no_proposal() -> None:
    budget = Budget(kind="keep", limit=1.0)
    assert propose(SOLVER, budget, ERRORS, uniform=SOLVER.solve(budget)) is None


def test_nothing_is_proposed_where_some_layer_would_lose_its_last_neuron() -> None:
    budget = Budget(kind="keep", limit=1.5 / 400)
    uniform = SOLVER.solve(budget)
    assert {layout.num_neurons for layout in uniform} == {1}
    assert propose(SOLVER, budget, (1.0, 1e-9, 1e-9), uniform=uniform) is None
