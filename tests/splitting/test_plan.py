"""The plan names each layer's heavy hitters, as many as its layout has room for."""

from __future__ import annotations

import numpy as np

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.ffn.shapes import FFNShape, LayerLayout, PartLayout
from ffsplit.splitting.scores import LayerPlan, plan_split

SHAPE = FFNShape(num_neurons=6, hidden_size=4, gated=False, up_bias=True, down_bias=True)


def stats(sum_abs: list[float], sum_squares: list[float]) -> NeuronStats:
    n = len(sum_abs)
    return NeuronStats(
        num_tokens=10,
        sum_abs=np.array(sum_abs),
        sum=np.zeros(n),
        sum_squares=np.array(sum_squares),
        max_abs=np.ones(n),
        num_active=np.ones(n, dtype=np.int64),
        down_norm=np.ones(n),
    )


def test_each_layer_has_its_own_heavy_hitters_by_the_chosen_score() -> None:
    layers = [stats([6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]), stats([1, 9, 1, 9, 1, 1], [7, 1, 1, 1, 7, 1])]
    layout = LayerLayout(heavy=PartLayout.dense(SHAPE, 2), light=PartLayout.dense(SHAPE, 4), down_bias=True)
    by_mean, by_rms = (plan_split(layers, [layout] * 2, score=score) for score in ("mean", "rms"))
    assert [plan.heavy_neurons for plan in by_mean] == [(0, 1), (1, 3)]
    assert [plan.heavy_neurons for plan in by_rms] == [(4, 5), (0, 4)]
    assert [plan.layer for plan in by_mean] == [0, 1]


def test_without_a_heavy_part_no_neuron_is_heavy() -> None:
    layout = LayerLayout(heavy=None, light=PartLayout.dense(SHAPE, 6), down_bias=True)
    (plan,) = plan_split([stats([1.0] * 6, [1.0] * 6)], [layout], score="mean")
    assert plan.heavy_neurons == ()


def test_a_plan_survives_json() -> None:
    plan = LayerPlan(layer=3, layout=LayerLayout.dense(SHAPE), heavy_neurons=(0, 5))
    assert LayerPlan.model_validate_json(plan.model_dump_json()) == plan
