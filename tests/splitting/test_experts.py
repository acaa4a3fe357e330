"""Whole experts: how many a budget drops, which of them, and what is left of the others."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compressors import PruneCompressor
from ffsplit.config import Budget
from ffsplit.errors import BudgetError, CalibrationError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, Mixture, ModelShape
from ffsplit.splitting.layer import HeavyRule
from ffsplit.splitting.scores import choose_dropped, router_weighted_norm
from ffsplit.splitting.solver import Solver
from tests.calibration.random_statistics import random_statistics

SHARED = FFNShape(num_neurons=128, hidden_size=32, gated=True, up_bias=False, down_bias=False)
EXPERT = SHARED.model_copy(update={"num_neurons": 64, "width_multiple": 8})
MIXTURE = Mixture(num_experts=8, fewest=2, num_groups=1, firsts=(1, 9), router_elements=64)
MODEL = ModelShape(
    shapes=(SHARED, *[EXPERT] * 16),
    itemsize=4,
    num_parameters=200_000,
    num_parameters_without_embeddings=150_000,
    width_groups=(0, *[1] * 16),
    mixture=MIXTURE,
)
SOLVER = Solver(
    model=MODEL, heavy=HeavyRule(by="share", value=1), steps=(PruneCompressor(),), expert_share=1.0
)
GROUPED = replace(
    SOLVER, model=MODEL.model_copy(update={"mixture": MIXTURE.model_copy(update={"num_groups": 2})})
)
FIXED = replace(SOLVER, model=MODEL.model_copy(update={"width_groups": (-1,) * 17}))
"""Of a family whose config states no width."""
HALF = replace(SOLVER, expert_share=0.5)


def keep(limit: float) -> Budget:
    return Budget(kind="keep", limit=limit)


@settings(deadline=None, max_examples=100)
@given(limit=st.floats(0.25, 1), solver=st.sampled_from([SOLVER, GROUPED, HALF]))
def test_experts_alone_make_the_saving_and_meet_the_budget(limit: float, solver: Solver) -> None:
    layouts = solver.solve(keep(limit))
    assert layouts[0] == LayerLayout.dense(SHARED), "an FFN that sees every token stays whole"
    kept = solver.cost(keep(limit), layouts)
    step = 16 * 8 * EXPERT.elements_per_neuron / MODEL.ffn_elements  # 8 neurons of every expert
    assert limit - 1.02 * step < kept <= limit + 1e-9
    assert layouts[1:9] == layouts[9:], "every block has as many"
    assert len(set(layouts[1:]) - {LayerLayout.dropped()}) == 1
    assert MIXTURE.num_dropped(layouts) % solver.model.mixture.num_groups == 0


@pytest.mark.parametrize("solver", [SOLVER, GROUPED, FIXED, HALF])
def test_keeping_everything_drops_nothing(solver: Solver) -> None:
    assert solver.solve(keep(1)) == tuple(LayerLayout.dense(shape) for shape in MODEL.shapes)


def test_whole_experts_are_dropped_before_any_is_narrowed() -> None:
    whole = 2 * EXPERT.num_elements / MODEL.ffn_elements  # one expert of each block
    layouts = SOLVER.solve(keep(1 - 3 * whole))
    assert (MIXTURE.num_dropped(layouts), layouts[1].num_neurons) == (3, 64)
    layouts = SOLVER.solve(keep(1 - 3.5 * whole))
    assert (MIXTURE.num_dropped(layouts), layouts[1].num_neurons) == (3, 56)
    layouts = HALF.solve(keep(1 - 4 * whole))
    assert (MIXTURE.num_dropped(layouts), layouts[1].num_neurons) == (2, 40)
    layouts = FIXED.solve(keep(1 - 3.5 * whole))
    assert (MIXTURE.num_dropped(layouts), layouts[1].num_neurons) == (4, 64), "no config states a width"


@pytest.mark.parametrize("multiple", [16, 24])
def test_narrower_experts_are_multiples_and_whole_ones_stay_whole(multiple: int) -> None:
    """Also where the multiple does not divide their width: a whole expert needs no config to state it."""
    for limit in (0.9, 0.7, 0.5, 0.35):
        widths = {each.num_neurons for each in replace(HALF, multiple=multiple).solve(keep(limit))[1:]} - {0}
        assert len(widths) == 1 and all(width % multiple == 0 or width == 64 for width in widths)
        fixed = replace(FIXED, multiple=multiple).solve(keep(limit))
        assert {each.num_neurons for each in fixed[1:]} == {0, 64}
        assert fixed == FIXED.solve(keep(limit))


def test_a_budget_in_parameters_counts_the_rows_of_routers() -> None:
    whole = 2 * EXPERT.num_elements + MIXTURE.router_elements
    layouts = SOLVER.solve(Budget(kind="max_parameters", limit=200_000 - whole))
    assert MODEL.parameters_of(layouts) == 200_000 - whole
    assert MODEL.parameters_in_blocks_of(layouts) == 150_000 - whole


@pytest.mark.parametrize("solver", [SOLVER, FIXED])
def test_the_error_names_the_smallest_that_works(solver: Solver) -> None:
    message = "too small for the 2 of 8 experts per block that the router needs: the smallest is "
    with pytest.raises(BudgetError, match=message) as caught:
        solver.solve(keep(0.1))
    smallest = float(re.search(r"smallest is (\S+)", str(caught.value))[1])
    assert MIXTURE.num_dropped(solver.solve(keep(smallest))) == 6
    with pytest.raises(BudgetError):
        solver.solve(keep(smallest - 2e-6))


def weighted(*norms: float) -> list[NeuronStats]:
    """Statistics of experts of these scores, ten tokens each."""
    zeros_N, counts_N = np.zeros(4), np.zeros(4, dtype=np.int64)
    arrays = (zeros_N, zeros_N, zeros_N, zeros_N, counts_N, np.ones(4))
    return [NeuronStats(10, *arrays, index % 4, 10 * norm) for index, norm in enumerate(norms)]


NARROW = LayerLayout.dense(EXPERT, 56)


def test_the_lowest_scores_of_each_block_are_dropped() -> None:
    mixture = Mixture(num_experts=4, fewest=2, num_groups=1, firsts=(0, 4), router_elements=1)
    layouts = (NARROW, NARROW, LayerLayout.dropped(), LayerLayout.dropped()) * 2
    found = choose_dropped(layouts, weighted(1, 4, 2, 3, 5, 5, 5, 5), mixture=mixture)
    assert [index for index, layout in enumerate(found) if layout.is_dropped] == [0, 2, 6, 7]
    assert {layout for layout in found if not layout.is_dropped} == {NARROW}


def test_every_group_keeps_as_many() -> None:
    mixture = Mixture(num_experts=4, fewest=2, num_groups=2, firsts=(0,), router_elements=1)
    layouts = (NARROW, LayerLayout.dropped()) * 2
    found = choose_dropped(layouts, weighted(1, 2, 8, 9), mixture=mixture)
    assert [layout.is_dropped for layout in found] == [True, False, True, False]


def test_the_score_is_a_mean_over_tokens_and_needs_the_routers_weights() -> None:
    (stats,) = weighted(3)
    assert router_weighted_norm(stats) == 3
    assert router_weighted_norm(replace(stats, num_tokens=0, sum_weighted_norm=0.0)) == 0
    with pytest.raises(CalibrationError, match="do not say how experts were weighted"):
        router_weighted_norm(random_statistics(0))
