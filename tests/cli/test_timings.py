"""The table of `ffsplit benchmark`, from records that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from ffsplit.cli.tables import print_benchmark
from ffsplit.store.benchmark_records import BenchmarkRecord, Cost, Figures, Timing
from ffsplit.store.manifest import Environment, LoadAverage


def figures(p50_ms: float, *, tail: float = 1.1) -> Figures:
    return Figures(p50_ms=p50_ms, p95_ms=p50_ms * tail, p99_ms=p50_ms * 2, tokens_per_s=1000.0)


def record(*, tail: float = 1.1, **fields: Any) -> BenchmarkRecord:
    timing = Timing(
        phase="forward",
        batch_size=2,
        num_tokens=16,
        original=figures(8.0, tail=tail),
        compressed=figures(4.0),
        speedup=2.0,
        limit=2.5,
        limited_by="multiplications",
        share_of_limit=0.8,
        num_pairs=30,
    )
    given: dict[str, Any] = {
        "created_at": "2025-01-01T00:00:00+00:00",
        "model": "m",
        "against": "n",
        "run_key": None,
        "attempt": None,
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 2,
        "environment": Environment(versions={}, hardware={}),
        "original": Cost(load_s=0.3, peak_memory_bytes=None),
        "compressed": Cost(load_s=0.2, peak_memory_bytes=None),
        "timings": (timing,),
    }
    return BenchmarkRecord(**(given | fields))


@pytest.mark.parametrize(
    ("made", "said", "not_said"),
    [
        (record(), ["2.50\u00d7 by multiplications"], ["load average", "warning", "peak memory"]),
        (
            record(load=LoadAverage(before=0.5, after=1.0, num_cpus=2)),
            ["load average 0.50 before and 1.00 after, on 2 CPUs"],
            ["warning"],
        ),
        (record(tail=1.8), ["warning: timings are noisy: forward at 2 \u00d7 16: the original's p95"], []),
    ],
    ids=["quiet", "load", "noisy"],
)
def test_what_disturbed_the_timings_is_told_and_nothing_else(
    made: BenchmarkRecord, said: list[str], not_said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_benchmark(made)
    printed = capsys.readouterr().out
    assert all(words in printed for words in said), printed
    assert not any(words in printed for words in not_said), printed
