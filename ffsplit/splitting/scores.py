"""How much each neuron matters, from its statistics alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ffsplit.calibration.statistics import Floats, Ints, NeuronStats, experts_together
from ffsplit.config import Record
from ffsplit.errors import CalibrationError
from ffsplit.ffn.shapes import LayerLayout, Mixture
from ffsplit.splitting.layer import HeavyRule

ScoreName = Literal["mean", "rms", "centred"]


def _checked(stats: NeuronStats) -> int:
    if stats.num_tokens == 0:
        raise CalibrationError("an FFN saw no token, so its neurons cannot be scored")
    return stats.num_tokens


def expected_output_norm(stats: NeuronStats) -> Floats:
    """Mean L2 norm of each neuron's output, E|a_n| * |W_down[:, n]|: [N], in units of the residual stream.

    Source: arXiv:2401.04044, section 3. Raises CalibrationError when no token was observed.
    """
    return stats.sum_abs / _checked(stats) * stats.down_norm


def rms_output_norm(stats: NeuronStats) -> Floats:
    """Root mean square norm of each neuron's output, sqrt(E a_n^2) * |W_down[:, n]|: [N]."""
    return np.sqrt(output_energy(stats))


def centred_output_norm(stats: NeuronStats) -> Floats:
    """Standard deviation of each neuron's output: [N]. What is left once a bias holds the mean."""
    num_tokens = _checked(stats)
    variance = stats.sum_squares / num_tokens - (stats.sum / num_tokens) ** 2
    return np.sqrt(np.maximum(variance, 0.0)) * stats.down_norm


def output_energy(stats: NeuronStats) -> Floats:
    """Mean squared norm of each neuron's output, E a_n^2 * |W_down[:, n]|^2: [N].

    Zero for an expert that no token was sent to.
    """
    if stats.expert is not None and stats.num_tokens == 0:
        return np.zeros_like(stats.sum_squares)
    return stats.sum_squares / _checked(stats) * stats.down_norm**2


FEWEST_TOKENS = 64
"""An expert that saw fewer tokens is not scored by their statistics."""


def is_starved(stats: NeuronStats) -> bool:
    """Whether this is an expert that saw too few tokens to be scored by their statistics."""
    return stats.expert is not None and stats.num_tokens < FEWEST_TOKENS


def well_sampled(statistics: Sequence[NeuronStats], group: Sequence[int]) -> list[int]:
    """The FFNs of a group that saw enough tokens to be scored by their statistics; all if none did."""
    return [index for index in group if not is_starved(statistics[index])] or list(group)


def scores_of(stats: NeuronStats, *, score: ScoreName) -> Floats:
    """Each neuron's score: [N].

    An expert that saw too few tokens is scored by its weights alone, |W_down[:, n]|, whatever `score` is.
    """
    return stats.down_norm if is_starved(stats) else SCORES[score](stats)


SCORES: dict[ScoreName, Callable[[NeuronStats], Floats]] = {
    "mean": expected_output_norm,
    "rms": rms_output_norm,
    "centred": centred_output_norm,
}


def router_weighted_norm(stats: NeuronStats) -> float:
    """Mean over an expert's tokens of the router's weight times the L2 norm of its output, g(x) |f(x)|.

    In units of the residual stream; 0 if it saw no token. Source: REAP, arXiv:2510.13999, equation 9. Raises
    CalibrationError if the statistics lack it.
    """
    if stats.sum_weighted_norm is None:
        raise CalibrationError(
            "these statistics do not say how experts were weighted, so none can be dropped: calibrate again"
        )
    return stats.sum_weighted_norm / max(1, stats.num_tokens)


def choose_dropped(
    layouts: Sequence[LayerLayout], statistics: Sequence[NeuronStats], *, mixture: Mixture
) -> tuple[LayerLayout, ...]:
    """The same layouts, with those of the dropped experts given to the lowest scores of their block.

    If the router divides experts into groups, to the lowest of each group. Of equal scores the lower index
    stays.
    """
    chosen, in_group = list(layouts), mixture.num_experts // mixture.num_groups
    for first in mixture.firsts:
        for start in range(first, first + mixture.num_experts, in_group):
            group = range(start, start + in_group)
            best = sorted(group, key=lambda index: -router_weighted_norm(statistics[index]))
            kept = [layouts[index] for index in group if not layouts[index].is_dropped]
            dropped = [LayerLayout.dropped()] * (in_group - len(kept))
            for index, layout in zip(best, (*kept, *dropped), strict=True):
                chosen[index] = layout
    return tuple(chosen)


def top_neurons(scores: Floats, *, count: int) -> Ints:
    """Indices of the `count` highest scores, ascending; of equal scores the lower index comes first."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:count])


def energy_share(stats: NeuronStats, *, fraction: float) -> float:
    """Share of the layer's output energy that the top `fraction` of its neurons hold, in [0, 1]."""
    energy = np.sort(output_energy(stats))[::-1]
    total = float(energy.sum())
    count = max(1, round(fraction * len(energy)))
    return float(energy[:count].sum()) / total if total > 0 else 0.0


ENERGY_SHARES = (0.5, 0.9, 0.99)
"""The shares of a layer's output energy for which its concentration is reported."""


def neurons_for_energy(stats: NeuronStats, *, share: float) -> int:
    """The fewest neurons that hold at least `share` of a layer's output energy: at least one.

    A layer without any energy needs one. `share` is in [0, 1].
    """
    assert 0 <= share <= 1, share
    cumulative = np.cumsum(np.sort(output_energy(stats))[::-1])
    reached = np.searchsorted(cumulative, share * cumulative[-1] * (1 - 1e-12))
    return min(int(reached) + 1, len(cumulative))


def energy_outside(stats: NeuronStats, neurons: Ints | Sequence[int]) -> float:
    """Share of the layer's output energy that is not in `neurons`, in [0, 1].

    The energy of a layer is the sum over its neurons of E a_n^2 * |W_down[:, n]|^2, as if their outputs
    were orthogonal. That is not exact for real layers, and ignores what a refit or a factorisation of the
    other neurons recovers.
    """
    energy = output_energy(stats)
    total = float(energy.sum())
    inside = float(energy[np.asarray(neurons, dtype=np.int64)].sum())
    return min(1.0, max(0.0, 1 - inside / total)) if total > 0 else 0.0


def energy_counts(stats: NeuronStats) -> dict[str, int]:
    """The fewest neurons that hold 50, 90 and 99 % of a layer's output energy, by percent."""
    return {f"{share * 100:g}": neurons_for_energy(stats, share=share) for share in ENERGY_SHARES}


# The split plan: per layer, which neurons are heavy hitters and how each part will be stored.


class LayerPlan(Record):
    """The plan for one layer's FFN. `heavy_neurons` are ascending indices."""

    layer: int
    layout: LayerLayout
    heavy_neurons: tuple[int, ...]

    @property
    def num_heavy_hitters(self) -> int:
        """How many neurons are better kept than the rest: those that were chosen, or those split off last."""
        heavy = self.layout.heavy
        if heavy is None or self.layout.light is None:
            return len(self.heavy_neurons)
        return heavy.num_neurons

    def stored_as(self, layout: LayerLayout) -> LayerPlan:
        """This plan with the layout that resulted."""
        return self.model_copy(update={"layout": layout})


def plan_split(
    statistics: Sequence[NeuronStats], layouts: Sequence[LayerLayout], *, score: ScoreName
) -> tuple[LayerPlan, ...]:
    """Choose each layer's heavy hitters: as many of its highest scores as its layout has room for."""
    plans = []
    for layer, (stats, layout) in enumerate(zip(statistics, layouts, strict=True)):
        width = layout.heavy.num_neurons if layout.heavy is not None else 0
        heavy = top_neurons(scores_of(stats, score=score), count=width)
        plans.append(LayerPlan(layer=layer, layout=layout, heavy_neurons=tuple(heavy.tolist())))
    return tuple(plans)


def num_energetic(heavy: HeavyRule, statistics: Sequence[NeuronStats]) -> tuple[int, ...] | None:
    """How many neurons an energy rule asks for in each FFN; None for other rules.

    The experts of a block share one width, so all of them get the largest number that one asks for. Experts
    that saw too few tokens ask for nothing.
    """
    if heavy.by != "energy":
        return None
    counts = [neurons_for_energy(stats, share=heavy.value) for stats in statistics]
    for group in experts_together(statistics):
        most = max(counts[index] for index in well_sampled(statistics, group))
        for index in group:
            counts[index] = most
    return tuple(counts)
