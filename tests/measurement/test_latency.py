"""A latency record is consistent with itself, and with what the models did."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from ffsplit.measurement.latency import WARM_UP_RUNS, paired_latency


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
        assert 1.2 < record.speedup <= 12.5 / 4 * 1.5


def test_both_run_alike_and_take_turns_to_go_first() -> None:
    calls: list[tuple[Sleeper, torch.Tensor]] = []
    first, second = Sleeper(0, calls), Sleeper(0, calls)
    paired_latency(first, second, shapes=[(2, 5)], num_pairs=4)
    assert len(calls) == 2 * (WARM_UP_RUNS + 4)
    assert all(torch.equal(ids, calls[0][1]) for _, ids in calls)
    assert calls[0][1].shape == (2, 5) and int(calls[0][1].max()) < 7
    timed = ["first" if model is first else "second" for model, _ in calls[2 * WARM_UP_RUNS :]]
    assert timed == ["first", "second", "second", "first"] * 2
