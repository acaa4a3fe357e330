"""Proposals spend the same budget, differ from uniform, and do what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compressors import PruneCompressor
from ffsplit.config import Budget
from ffsplit.ffn import FFNShape, ModelShape
from ffsplit.splitting.allocation import UNIFORM, equal_error_counts, propose, top_energy_counts
from ffsplit.splitting.heavy import HeavyRule
from ffsplit.splitting.solver import Solver

SHAPE = FFNShape(num_neurons=400, hidden_size=32, gated=False, up_bias=True, down_bias=True)
MODEL = ModelShape(
    shapes=(SHAPE,) * 3, itemsize=4, num_parameters=200_000, num_parameters_without_embeddings=100_000
)
SOLVER = Solver(model=MODEL, heavy=HeavyRule(by="share", value=1), steps=(PruneCompressor(),))
POWERS = (0.2, 0.6, 1.5)
ENERGIES = [np.arange(1, 401, dtype=np.float64) ** -power for power in POWERS]
COSTS = [SHAPE.elements_per_neuron] * 3


def stats_of(energy: np.ndarray) -> NeuronStats:
    n = len(energy)
    return NeuronStats(
        num_tokens=1,
        sum_abs=np.sqrt(energy),
        sum=np.zeros(n),
        sum_squares=energy,
        max_abs=np.ones(n),
        num_active=np.ones(n, dtype=np.int64),
        down_norm=np.ones(n),
    )


@pytest.mark.parametrize("limit", [0.5, 0.2])
def test_every_candidate_keeps_to_the_budget(limit: float) -> None:
    budget = Budget(kind="keep", limit=limit)
    uniform = SOLVER.solve(budget)
    candidates = propose(SOLVER, budget, [stats_of(e) for e in ENERGIES], uniform=uniform)
    assert candidates[0] == (UNIFORM, uniform)
    assert [each.name for each in candidates[1:]] == [
        "equal-error",
        "equal-error-half",
        "energy",
        "energy-half",
    ]
    for candidate in candidates:
        assert 0.85 * limit < SOLVER.cost(budget, candidate.layouts) <= limit
    widths = [layout.num_neurons for layout in candidates[1].layouts]
    assert widths[0] > widths[1] > widths[2], "flat layers need more neurons for the same error"


def test_layers_alike_stay_uniform_but_for_what_does_not_divide() -> None:
    budget = Budget(kind="keep", limit=0.5)
    uniform = SOLVER.solve(budget)
    for candidate in propose(SOLVER, budget, [stats_of(ENERGIES[1])] * 3, uniform=uniform):
        for layout, other in zip(candidate.layouts, uniform, strict=True):
            assert abs(layout.num_neurons - other.num_neurons) <= 2


def test_equal_error_leaves_the_same_share_out() -> None:
    size = 600 * COSTS[0]
    counts = equal_error_counts(ENERGIES, costs=COSTS, num_elements=size)
    left = [1 - e[:n].sum() / e.sum() for e, n in zip(ENERGIES, counts, strict=True)]
    assert max(left) - min(left) < 0.01
    assert 590 < sum(counts) <= 600


def test_the_most_energetic_of_all_layers_are_taken() -> None:
    counts = top_energy_counts(ENERGIES, costs=COSTS, num_elements=300 * COSTS[0])
    assert sum(counts) == 300
    taken = np.concatenate([e[:n] for e, n in zip(ENERGIES, counts, strict=True)])
    left = np.concatenate([e[n:] for e, n in zip(ENERGIES, counts, strict=True)])
    assert taken.min() >= left.max()


def test_a_layer_without_energy_keeps_something() -> None:
    budget = Budget(kind="keep", limit=0.3)
    statistics = [stats_of(ENERGIES[0]), stats_of(np.zeros(400)), stats_of(ENERGIES[2])]
    for candidate in propose(SOLVER, budget, statistics, uniform=SOLVER.solve(budget)):
        assert min(layout.num_neurons for layout in candidate.layouts) >= 1
