"""Statistics of random activations."""

from __future__ import annotations

import numpy as np

from ffsplit.calibration.statistics import NeuronStats


def random_statistics(seed: int, *, num_neurons: int = 12, weights_seed: int = 0) -> NeuronStats:
    """The statistics of one shard; shards of one `weights_seed` merge."""
    generator = np.random.default_rng(seed)
    num_tokens = int(generator.integers(1, 200))
    scale = generator.lognormal(0, 3, num_neurons)
    a_TN = generator.normal(0, 1, (num_tokens, num_neurons)) * scale
    return NeuronStats(
        num_tokens=num_tokens,
        sum_abs=np.abs(a_TN).sum(0),
        sum=a_TN.sum(0),
        sum_squares=(a_TN**2).sum(0),
        max_abs=np.abs(a_TN).max(0),
        num_active=(a_TN > 0).sum(0),
        down_norm=np.random.default_rng(weights_seed).lognormal(0, 1, num_neurons),
    )


def assert_identical(first: NeuronStats, second: NeuronStats) -> None:
    assert first.num_tokens == second.num_tokens
    for name in ("sum_abs", "sum", "sum_squares", "max_abs", "num_active", "down_norm"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), name
