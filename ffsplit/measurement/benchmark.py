"""`ffsplit benchmark`: time an artifact and its original alternately, and append the record to the run."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ffsplit.config import Device, DType
from ffsplit.directories import by_name
from ffsplit.errors import ConfigError, begun
from ffsplit.machine import check_device, describe_environment, usable_cores
from ffsplit.measurement.latency import WARM_UP_RUNS, load_average, load_since, time_models
from ffsplit.measurement.memory import peak_memory_bytes
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.fetch import locate_model
from ffsplit.models.load import load_whole_model
from ffsplit.store.artifact import Location, locate, read_manifest
from ffsplit.store.benchmark_records import BenchmarkRecord, Cost, append_benchmark
from ffsplit.store.cache import is_remote
from ffsplit.store.pull import materialize

NUM_LOADS = 3


@dataclass(frozen=True)
class Settings:
    """What is timed, and how. By default the device is the GPU if there is one."""

    batch_sizes: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (16, 128)
    pairs: int = 30
    new_tokens: int = 32
    device: Device = "auto"
    dtype: DType = "auto"
    threads: int | None = None
    memory: bool = True

    def checked(self) -> Settings:
        """Raise ConfigError for what cannot be timed on this machine."""
        for flag, values in (("--batch-sizes", self.batch_sizes), ("--lengths", self.lengths)):
            if not values or min(values) < 1:
                raise ConfigError(f"{flag} must be 1 or more")
        if self.pairs < 1 or self.new_tokens < 0 or (self.threads is not None and self.threads < 1):
            raise ConfigError("--pairs and --threads must be 1 or more, --new-tokens 0 or more")
        check_device("cuda" if self.on_cuda else "cpu", str(self.torch_dtype).removeprefix("torch."))
        return self

    @property
    def on_cuda(self) -> bool:
        return torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if self.on_cuda else torch.float32
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Pair:
    """The two directories that are compared, and the artifact's location if it is published."""

    original: Path
    compressed: Path
    location: Location | None


def benchmark(uri: str, *, against: str | None = None, settings: Settings = Settings()) -> BenchmarkRecord:
    """Time the model at `uri` and another one alternately in this process.

    `uri` is an artifact or a dense model. An artifact is compared with `against`, or with the model
    it was made from; a dense model with `against`, or with itself. Raises ConfigError if either is
    missing, or the original has changed since the artifact was made.
    """
    settings = settings.checked()
    pair = _find(uri, against)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or min(threads, usable_cores()))
    try:
        record = _measure(uri, against, pair, settings)
        return by_name(record, given=(record.model, record.against))
    finally:
        torch.set_num_threads(threads)


def publish(uri: str, record: BenchmarkRecord) -> str | None:
    """Append a benchmark to its artifact. Returns its key, None if the artifact is not committed."""
    if record.run_key is None:
        return None
    with begun():  # from here on a failure loses the timings, so it is not the user's mistake
        location = locate(uri)
        if location.run_key != record.run_key:  # another run may be the newest, or the one in use, by now
            location = locate(f"{location.store.uri}/{record.run_key}")
        return append_benchmark(location, record) if location.commit is not None else None


def _find(uri: str, against: str | None) -> Pair:
    try:
        location = locate(uri)
    except ConfigError:
        directory = open_checkpoint(locate_model(uri).directory).directory
        return Pair(locate_model(against or uri).directory, directory, None)
    compressed = materialize(location.uri)
    manifest = read_manifest(location)
    if manifest.kind != "model":
        raise ConfigError(f"{uri} holds statistics, not a model")
    model = manifest.model
    if against is None and model.revision is None and not is_remote(model.id):
        raise ConfigError(f"{uri} was made from a local model, {model.id}: give its directory with --against")
    original = locate_model(against or model.id, revision=None if against else model.revision).directory
    if against is None and open_checkpoint(original).model_digest() != model.digest:
        raise ConfigError(f"{model.id} has changed since the artifact was made: give --against MODEL")
    return Pair(original, compressed, location)


def _measure(uri: str, against: str | None, pair: Pair, settings: Settings) -> BenchmarkRecord:
    checkpoint = open_checkpoint(pair.original)
    if not checkpoint.reads_single_texts:
        raise ConfigError(
            f"ffsplit benchmark times models that read single texts, and {uri} does not: its manifest has "
            "what the run itself timed"
        )
    shapes = _shapes(settings, checkpoint)
    device = "cuda" if settings.on_cuda else "cpu"
    loads: tuple[list[float], list[float]] = ([], [])
    for _ in range(NUM_LOADS):
        models = []
        for directory, times in zip((pair.original, pair.compressed), loads, strict=True):
            start = time.perf_counter()
            models.append(_load(directory, settings.torch_dtype).to(device))
            times.append(time.perf_counter() - start)
    before = load_average()
    timings = time_models(*models, shapes=shapes, num_pairs=settings.pairs, new_tokens=settings.new_tokens)
    load = load_since(before)
    del models
    costs = [
        Cost(
            load_s=statistics.median(times),
            peak_memory_bytes=_peak(directory, shapes[-1], settings),
        )
        for directory, times in zip((pair.original, pair.compressed), loads, strict=True)
    ]
    location = pair.location
    return BenchmarkRecord(
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=uri,
        against=against or str(pair.original),
        run_key=None if location is None else location.run_key,
        attempt=None if location is None else location.attempt,
        device=device,
        dtype=str(settings.torch_dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        environment=describe_environment(),
        original=costs[0],
        compressed=costs[1],
        timings=timings,
        load=load,
    )


def _shapes(settings: Settings, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """The grid. No row is longer than the model can read, with the tokens that it decodes."""
    longest = checkpoint.max_positions or max(settings.lengths)
    if checkpoint.makes == "next_tokens" and checkpoint.max_positions is not None:
        longest -= settings.new_tokens + WARM_UP_RUNS
        if longest < 1:
            raise ConfigError(f"--new-tokens {settings.new_tokens} leaves no room for a prompt in the model")
    lengths = dict.fromkeys(min(length, longest) for length in settings.lengths)
    return [(rows, tokens) for rows in dict.fromkeys(settings.batch_sizes) for tokens in lengths]


def _peak(directory: Path, shape: tuple[int, int], settings: Settings) -> int | None:
    if not settings.memory:
        return None
    return peak_memory_bytes(
        directory,
        _class_name(directory),
        shape=shape,
        device="cuda" if settings.on_cuda else "cpu",
        dtype=str(settings.torch_dtype).removeprefix("torch."),
    )


def _load(directory: Path, dtype: torch.dtype) -> Any:
    return load_whole_model(directory, _class_name(directory), dtype=dtype)


def _class_name(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text("utf-8"))
    return str((config.get("architectures") or [""])[0])
