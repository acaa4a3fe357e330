"""Ways to share one budget out over the layers, as the statistics suggest them.

They are proposals only: errors of single layers do not add up to the model's, so whoever takes one
has to judge it end to end against the uniform layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ffsplit.calibration.statistics import Floats, NeuronStats, experts_together
from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.ffn import LayerLayout
from ffsplit.splitting.scores import judged, output_energy
from ffsplit.splitting.solver import Solver

UNIFORM = "uniform"
SMALLEST_WEIGHT = 1 / 8
"""No layer is proposed a fraction under this part of the average layer's."""


class Candidate(NamedTuple):
    """One way to share the budget out."""

    name: str
    layouts: tuple[LayerLayout, ...]


def propose(
    solver: Solver, budget: Budget, statistics: Sequence[NeuronStats], *, uniform: tuple[LayerLayout, ...]
) -> list[Candidate]:
    """The uniform layers first, then what differs from them and from one another within the budget.

    `equal-error` leaves the same share of each layer's output energy outside its heavy hitters;
    `energy` ranks the neurons of all layers together by output energy; `-half` lies half-way
    between one of these and uniform.
    """
    size = solver.model.elements_of(uniform)
    costs = [shape.elements_per_neuron for shape in solver.model.shapes]
    energies = [np.sort(output_energy(stats))[::-1] for stats in statistics]
    candidates = [Candidate(UNIFORM, uniform)]
    for name, counts in (
        ("equal-error", equal_error_counts(energies, costs=costs, num_elements=size)),
        ("energy", top_energy_counts(energies, costs=costs, num_elements=size)),
    ):
        weights = np.array([max(1, n) for n in counts]) / [len(energy) for energy in energies]
        for group in experts_together(statistics):
            weights[group] = weights[judged(statistics, group)].mean()
        weights = np.maximum(weights / weights.mean(), SMALLEST_WEIGHT)
        for suffix, profile in (("", weights), ("-half", (weights + 1) / 2)):
            try:
                layouts = solver.solve(budget, profile=profile.tolist())
            except BudgetError:
                continue
            if all(layouts != each.layouts for each in candidates):
                candidates.append(Candidate(name + suffix, layouts))
    return candidates


def equal_error_counts(energies: Sequence[Floats], *, costs: Sequence[int], num_elements: int) -> list[int]:
    """Neurons a layer, so that each leaves the same share of its energy out, in about `num_elements`.

    `energies` are each layer's [N], largest first; `costs` are the elements of one neuron.
    """
    outside = [1 - np.cumsum(energy) / max(energy.sum(), 1e-300) for energy in energies]

    def counts(share: float) -> list[int]:
        return [int(np.searchsorted(-left, -share)) + 1 for left in outside]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        taken = sum(n * cost for n, cost in zip(counts(middle), costs, strict=True))
        low, high = (middle, high) if taken > num_elements else (low, middle)
    return [min(n, len(energy)) for n, energy in zip(counts(high), energies, strict=True)]


def top_energy_counts(energies: Sequence[Floats], *, costs: Sequence[int], num_elements: int) -> list[int]:
    """Neurons a layer, when those of most energy an element are taken from all layers at once."""
    layer = np.concatenate([np.full(len(energy), i) for i, energy in enumerate(energies)])
    cost = np.asarray(costs)[layer]
    order = np.argsort(-np.concatenate(energies) / cost, kind="stable")
    taken = order[np.cumsum(cost[order]) <= num_elements]
    return [int(count) for count in np.bincount(layer[taken], minlength=len(energies))]
