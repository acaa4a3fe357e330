"""A latency record is consistent with itself, and with what the models did."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ffsplit.measurement import latency
from ffsplit.measurement.latency import (
    FEWEST_PAIRS,
    MOST_ROUNDS,
    WARM_UP_RUNS,
    load_average,
    load_since,
    paired_latency,
    spread_of,
)


class Sleeper:
    """Takes its time, and remembers what it was asked."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(pad_token_id=0, vocab_size=7)

    def __init__(self, seconds: float, calls: list[tuple[Sleeper, torch.Tensor]]) -> None:
        self.seconds, self.calls = seconds, calls

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        assert attention_mask.shape == input_ids.shape and bool(attention_mask.all())
        assert torch.is_inference_mode_enabled()
        self.calls.append((self, input_ids))
        time.sleep(self.seconds)

    __call__ = forward


def test_the_record_is_consistent() -> None:
    calls: list[tuple[Sleeper, torch.Tensor]] = []
    slow, fast = Sleeper(0.012, calls), Sleeper(0.004, calls)
    shapes = [(1, 16), (4, 8)]
    records = paired_latency(slow, fast, shapes=shapes, num_pairs=6)
    assert [(record.batch_size, record.num_tokens) for record in records] == shapes
    for record in records:
        assert record.num_pairs == 6
        assert 12 <= record.original_p50_ms <= record.original_p95_ms
        assert 4 <= record.compressed_p50_ms <= record.compressed_p95_ms
        tokens = record.batch_size * record.num_tokens
        assert record.original_tokens_per_s == pytest.approx(tokens / record.original_p50_ms * 1000)
        assert record.compressed_tokens_per_s == pytest.approx(tokens / record.compressed_p50_ms * 1000)
        assert record.speedup == record.original_p50_ms / record.compressed_p50_ms > 1.2
        spread = record.spread
        assert spread is not None and spread.low is not None and spread.high is not None
        assert spread.low <= record.speedup <= spread.high and spread.p10 <= spread.p90


def test_both_run_alike_and_take_turns_to_go_first() -> None:
    calls: list[tuple[Sleeper, torch.Tensor]] = []
    first, second = Sleeper(0, calls), Sleeper(0, calls)
    paired_latency(first, second, shapes=[(2, 5)], num_pairs=4)
    assert len(calls) == 2 * (WARM_UP_RUNS + 4)
    assert all(torch.equal(ids, calls[0][1]) for _, ids in calls)
    assert calls[0][1].shape == (2, 5) and int(calls[0][1].max()) < 7
    timed = ["first" if model is first else "second" for model, _ in calls[2 * WARM_UP_RUNS :]]
    assert timed == ["first", "second", "second", "first"] * 2


def test_the_spread_is_that_of_the_pairs_and_the_interval_that_of_the_ratio_of_medians() -> None:
    """Drift that hits both calls of a pair widens neither."""
    drift = np.linspace(1, 5, 40)
    steady = spread_of(np.stack([3 * drift, 2 * drift], axis=1))
    assert (steady.p10, steady.p90) == pytest.approx((1.5, 1.5))
    assert (steady.low, steady.high) == pytest.approx((1.5, 1.5))
    times = np.stack([np.full(101, 2.0), np.linspace(1, 2, 101)], axis=1)
    spread = spread_of(times)
    assert (spread.p10, spread.p90) == pytest.approx((2 / 1.9, 2 / 1.1))
    assert spread.low is not None and spread.high is not None
    assert spread.p10 < spread.low < 2 / 1.5 < spread.high < spread.p90
    assert spread_of(times) == spread
    assert spread_of(times[: FEWEST_PAIRS - 1]).low is None


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Over 300 draws of 20 noisy pairs whose ratio of medians is 1.5, nearly all intervals hold 1.5."""
    generator = np.random.default_rng(1)
    missed = 0
    for _ in range(300):
        noise = np.exp(0.2 * generator.standard_normal((20, 2)))
        missed += spread_of(noise * [3.0, 2.0]).decides(1.5)
    assert missed <= 9


@pytest.mark.parametrize(
    ("limit", "interval", "decided"),
    [(1.2, (1.2, 1.4), True), (1.21, (1.2, 1.4), False), (1.4, (1.2, 1.4), False), (1.41, (1.2, 1.4), True)],
)
def test_a_limit_is_decided_outside_the_interval(
    limit: float, interval: tuple[float, float], decided: bool
) -> None:
    assert latency.Spread(p10=1, p90=2, low=interval[0], high=interval[1]).decides(limit) == decided


def test_more_pairs_are_timed_only_where_noise_could_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is never enough for a gate, and what stays on the limit has an end."""
    ratio = {(1, 5): 1.0, (2, 5): 4.0}

    def paired_times(first: object, second: object, *, num_pairs: int, on_cuda: bool) -> np.ndarray:
        shape = shapes[len(asked)] if fresh[0] else shapes[len(asked) - 1]
        if fresh[0]:
            asked.append([])
        asked[-1].append(num_pairs)
        noise = np.tile([0.5, 1.0, 2.0], num_pairs)[:num_pairs]
        fresh[0] = False
        return np.stack([ratio[shape] * noise, np.ones(num_pairs)], axis=1)

    def example_inputs(*_: object, **__: object) -> dict[str, torch.Tensor]:
        fresh[0] = True
        return {}

    shapes, asked, fresh = list(ratio), list[list[int]](), [True]
    monkeypatch.setattr(latency, "paired_times", paired_times)
    monkeypatch.setattr(latency, "example_inputs", example_inputs)
    model = Sleeper(0, [])
    records = paired_latency(model, model, shapes=shapes, num_pairs=20, limits=[(None, 1.0)])
    assert asked == [[20] * MOST_ROUNDS, [20]]
    assert [record.num_pairs for record in records] == [20 * MOST_ROUNDS, 20]
    asked.clear()
    paired_latency(model, model, shapes=shapes, num_pairs=1, limits=[((2, 5), 0.1)])
    assert asked == [[1], [1, FEWEST_PAIRS]]


def test_the_load_is_that_of_the_machine() -> None:
    load = load_since(load_average())
    assert load is not None and load.num_cpus == len(os.sched_getaffinity(0))
    assert load.after == pytest.approx(os.getloadavg()[0], abs=2)
    assert load_since(None) is None


def test_a_system_that_tells_no_load_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    assert load_average() is None
    assert load_since(1.0) is None
