"""Timings of a published model, appended beside its attempt: `<run key>/benchmarks/<hardware>-<id>.json`.

The attempt itself does not change. Each benchmark is a separate file, so any number of machines can add
theirs at once.
"""

from __future__ import annotations

import re
import secrets
from typing import Literal

from pydantic import Field

from ffsplit.config import Record
from ffsplit.redaction import without_credentials
from ffsplit.store.artifact import Location
from ffsplit.store.commits import record_bytes
from ffsplit.store.manifest import Environment, LoadAverage, Spread
from ffsplit.store.schema import Versioned

BENCHMARKS_FOLDER = "benchmarks"


class Figures(Record):
    """Latency percentiles and throughput of one model."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    tokens_per_s: float


class Timing(Record):
    """Both models at one shape, in turn. `decode` generates one more token per row, after `num_tokens`."""

    phase: Literal["forward", "prefill", "decode"]
    batch_size: int
    num_tokens: int = Field(description="tokens per row")
    original: Figures
    compressed: Figures
    speedup: float = Field(description="original.p50_ms / compressed.p50_ms")
    spread: Spread | None = Field(default=None, description="of the speed-up")
    limit: float = Field(
        description="upper limit on the speed-up: the ratio of multiplications in all linear layers, or of "
        "the bytes of their weights when each weight is used for few tokens"
    )
    limited_by: Literal["multiplications", "bytes"]
    share_of_limit: float = Field(
        description="speedup / limit; integer products can exceed the limit by multiplications"
    )
    num_pairs: int


class Cost(Record):
    """Load time and peak memory of one model."""

    load_s: float = Field(description="from_pretrained with the files in the page cache, median of three")
    peak_memory_bytes: int | None


class BenchmarkRecord(Versioned):
    """One benchmark of two models on one machine."""

    created_at: str = Field(description="UTC, ISO 8601")
    model: str
    against: str
    run_key: str | None
    attempt: str | None
    device: str
    dtype: str
    num_threads: int
    environment: Environment
    original: Cost
    compressed: Cost
    timings: tuple[Timing, ...]
    load: LoadAverage | None = Field(default=None, description="None if the system does not report it")


def append_benchmark(location: Location, record: BenchmarkRecord) -> str:
    """Write a benchmark beside a published attempt, and return its key in the store."""
    hardware = record.environment.hardware
    name = str(hardware.get("gpu", "")) if record.device == "cuda" else str(hardware["processor"])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
    key = f"{record.run_key}/{BENCHMARKS_FOLDER}/{slug[:60]}-{secrets.token_hex(6)}.json"
    location.store.put_bytes(key, record_bytes(without_credentials(record)))
    return key
