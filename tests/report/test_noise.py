"""Noise is said where there is some, and a speed-up with its spread."""

from __future__ import annotations

from typing import Any

import pytest

from ffsplit.report.humanize import noise, spread_in_words
from ffsplit.store.manifest import Latency, LoadAverage, Spread


def latency(batch_size: int, *, original: float, compressed: float) -> Latency:
    """Medians of 10 ms and 5 ms with these times as p95."""
    fields: dict[str, Any] = dict.fromkeys(Latency.model_fields, 1)
    return Latency.model_validate(
        fields
        | {"batch_size": batch_size, "num_tokens": 128, "spread": None}
        | {"original_p50_ms": 10, "original_p95_ms": original}
        | {"compressed_p50_ms": 5, "compressed_p95_ms": compressed}
    )


CALM = latency(1, original=12, compressed=7)
QUIET = LoadAverage(before=0.3, after=2, num_cpus=2)


def said(*timed: Latency, load: LoadAverage | None = QUIET) -> str | None:
    found = noise(timed, load)
    return None if found is None else found.replace("\u00a0", " ")


def test_a_quiet_machine_is_not_mentioned() -> None:
    assert said(CALM) is None and said(CALM, load=None) is None and said() is None


def test_the_longest_tail_is_named() -> None:
    noisy, less = latency(8, original=31, compressed=12), latency(2, original=16, compressed=5)
    tail = "timings are noisy: at 8 \u00d7 128 tokens the {}'s p95 is {} times its p50"
    assert said(CALM, noisy, less) == tail.format("original", "3.10")
    assert said(latency(8, original=10, compressed=12), load=None) == tail.format("compressed model", "2.40")


@pytest.mark.parametrize(("before", "after"), [(2.1, 1.0), (1.0, 2.1)])
def test_a_load_beyond_the_cpus_is_named(before: float, after: float) -> None:
    load = LoadAverage(before=before, after=after, num_cpus=2)
    assert said(CALM, load=load) == (
        "timings are noisy: the CPUs were overloaded, "
        f"load average {before:.2f} before and {after:.2f} after, on 2 CPUs"
    )


def test_a_spread_in_words() -> None:
    assert spread_in_words(Spread(p10=1.236, p90=1.5, low=None, high=None)) == "1.24 to 1.50\u00d7"
    assert spread_in_words(None) == ""
