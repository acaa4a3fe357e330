"""The split plan: per layer, which neurons are heavy hitters and how each part will be stored."""

from __future__ import annotations

from collections.abc import Sequence

from ffsplit.calibration.statistics import NeuronStats, experts_together
from ffsplit.config import Record
from ffsplit.ffn import LayerLayout
from ffsplit.splitting.heavy import HeavyRule
from ffsplit.splitting.scores import ScoreName, judged, neurons_for_energy, scores_of, top_neurons


class LayerPlan(Record):
    """What is to become of one layer's FFN. `heavy_neurons` are ascending indices."""

    layer: int
    layout: LayerLayout
    heavy_neurons: tuple[int, ...]


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
    """How many neurons a rule by energy asks for in each FFN; None under another rule.

    The experts of a block all get what the one that asks for most does: they keep one width. Experts
    that saw too few tokens ask for nothing.
    """
    if heavy.by != "energy":
        return None
    counts = [neurons_for_energy(stats, share=heavy.value) for stats in statistics]
    for group in experts_together(statistics):
        most = max(counts[index] for index in judged(statistics, group))
        for index in group:
            counts[index] = most
    return tuple(counts)
