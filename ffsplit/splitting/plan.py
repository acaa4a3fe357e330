"""The split plan: per layer, which neurons are heavy hitters and how each part will be stored."""

from __future__ import annotations

from collections.abc import Sequence

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.config import Record
from ffsplit.ffn import LayerLayout
from ffsplit.splitting.heavy import HeavyRule
from ffsplit.splitting.scores import SCORES, ScoreName, neurons_for_energy, top_neurons


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
        heavy = top_neurons(SCORES[score](stats), count=width)
        plans.append(LayerPlan(layer=layer, layout=layout, heavy_neurons=tuple(heavy.tolist())))
    return tuple(plans)


def num_energetic(heavy: HeavyRule, statistics: Sequence[NeuronStats]) -> tuple[int, ...] | None:
    """How many neurons a rule by energy asks for in each layer; None under another rule."""
    if heavy.by != "energy":
        return None
    return tuple(neurons_for_energy(stats, share=heavy.value) for stats in statistics)
