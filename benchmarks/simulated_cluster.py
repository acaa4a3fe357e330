"""A thousand workers that are not there: what they would cost the driver, and what ten thousand shards do."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import write_statistics
from ffsplit.distributed.dispatch import Done, Event, Ready, dispatch
from ffsplit.distributed.ray_pools import ActorPool
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.run.stages.calibrate import Shard
from ffsplit.run.stages.reduce import reduce_job, reduced
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result, Scratch

NUM_LAYERS, NUM_NEURONS = 6, 1536
DISTINCT_SHARDS = 64
CROWDS = 2
STUB_S = 2.0
"""What a stub shard takes, so that a thousand of them are in flight at once."""
ROWS = tuple(f"row {index} of a shard's text, about as long as such rows are" for index in range(128))


class Cost(NamedTuple):
    """What the driver spent on a stage."""

    num_workers: int
    num_shards: int
    cpu_s: float
    wall_s: float
    most_in_flight: int

    def row(self, name: str) -> str:
        each_us = 1e6 * self.cpu_s / self.num_shards
        return (
            f"| {name} | {self.most_in_flight:,} | {self.num_shards:,} | {each_us:,.0f} us "
            f"| {self.wall_s:.1f} s |"
        )


def result_of(index: int) -> Result:
    entry = FileEntry(path=f".scratch/key/calibrate/shard-{index:05d}.parquet", size_bytes=1, sha256="0" * 64)
    facts: dict[str, Any] = {"index": index, "num_tokens": 9000, "num_rows": 128}
    return Result(name=f"shard-{index:05d}", files=(entry,), facts=facts)


@dataclass
class VirtualPool:
    """Slots in a time of their own: an item ends STUB_S after it began, and nobody waits for it."""

    num_workers: int
    now: float = 0.0
    most_in_flight: int = 0
    _names: Any = field(default_factory=count)
    _events: list[tuple[float, int, Event]] = field(default_factory=list)

    def room(self) -> int:
        return self.num_workers

    def open(self) -> int:
        slot = next(self._names)
        heapq.heappush(self._events, (self.now, slot, Ready(slot)))
        return slot

    def start(self, slot: int, item: Any) -> None:
        heapq.heappush(self._events, (self.now + STUB_S, slot, Done(slot, result_of(item.index))))
        self.most_in_flight = max(self.most_in_flight, len(self._events))

    def close(self, slot: int) -> None:
        pass

    def next_event(self, timeout_s: float) -> Event | None:
        self.now, _, event = heapq.heappop(self._events)
        return event


def dispatch_cost(*, num_workers: int, num_shards: int) -> Cost:
    """The driver's own part: handing out, counting, putting in order."""
    pool, shards = VirtualPool(num_workers), [Shard(index, ROWS) for index in range(num_shards)]
    wall, cpu = time.perf_counter(), time.process_time()
    assert len(dict(dispatch(pool, shards, stage="calibrate"))) == num_shards
    cost = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(num_workers, num_shards, *cost, pool.most_in_flight)


class _Crowd:
    """One process that plays many workers, each of which sleeps."""

    async def ready(self) -> None:
        return None

    async def run(self, item: Shard) -> Result:
        await asyncio.sleep(STUB_S)
        return result_of(item.index)


class CrowdPool(ActorPool):
    """A runner's pool whose slots share a few actors; all else is what runs on a cluster."""

    def __init__(self, crowds: list[Any], *, room: Callable[[], int]) -> None:
        super().__init__(_Crowd, stage="calibrate", room=room, options=dict)
        self._crowds, self._in_flight, self.most_in_flight = crowds, 0, 0

    def open(self) -> int:
        slot = next(self._names)
        self._actors[slot] = self._crowds[slot % len(self._crowds)]
        self._watch(slot, self._actors[slot].ready.remote(), ready=True)
        return slot

    def start(self, slot: int, item: Any) -> None:
        super().start(slot, item)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)

    def next_event(self, timeout_s: float) -> Event | None:
        event = super().next_event(timeout_s)
        self._in_flight -= isinstance(event, Done)
        return event

    def close(self, slot: int) -> None:
        self._running.pop(slot, None)


def ray_cost(*, num_workers: int, num_shards: int) -> Cost:
    """The same through Ray: real calls, real answers, stub work in a few processes."""
    with RayRunner(address="local", num_workers=CROWDS):
        crowd = ray.remote(_Crowd).options(num_cpus=0, max_concurrency=num_workers)
        pool = CrowdPool([crowd.remote() for _ in range(CROWDS)], room=lambda: num_workers)
        shards = [Shard(index, ROWS) for index in range(num_shards)]
        wall, cpu = time.perf_counter(), time.process_time()
        assert len(dict(dispatch(pool, shards, stage="calibrate"))) == num_shards
        cost = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(num_workers, num_shards, *cost, pool.most_in_flight)


class Reduction(NamedTuple):
    """What merging the statistics of many shards took, by a process that does all of it."""

    num_shards: int
    read_mb: float
    seconds: float
    memory_mb: float

    def row(self) -> str:
        figures = f"{self.read_mb:,.0f} | {self.seconds:.1f} | {self.memory_mb:.0f}"
        return f"| {self.num_shards:,} shards | {figures} |"


def reduce_cost(folder: Path, *, num_shards: int) -> Reduction:
    """Shards of MiniLM's size; a few distinct files stand for all of them."""
    scratch = Scratch(uri=str(folder / f"reduce-{num_shards}"), prefix=".scratch/key/reduce")
    distinct = [_stored_shard(scratch, folder, index) for index in range(DISTINCT_SHARDS)]
    parts = [distinct[index % DISTINCT_SHARDS] for index in range(num_shards)]
    process = psutil.Process()
    before, most = process.memory_info().rss, 0

    def run_tasks(jobs: Any) -> list[Result]:
        nonlocal most
        results = []
        for job in jobs:
            results.append(reduce_job(job))
            most = max(most, process.memory_info().rss)
        return results

    start = time.perf_counter()
    reduced(parts, lineage={}, scratch=scratch, run_tasks=run_tasks)
    seconds = time.perf_counter() - start
    read_mb = sum(entry.size_bytes for entry in parts) / 1e6
    return Reduction(num_shards, read_mb, seconds, max(0, most - before) / 1e6)


def _stored_shard(scratch: Scratch, folder: Path, index: int) -> FileEntry:
    generator = np.random.default_rng(index)

    def sums() -> Any:
        return generator.lognormal(0, 1, NUM_NEURONS)

    norm, path = np.ones(NUM_NEURONS), folder / f"shard-{index}.parquet"
    active = generator.integers(0, 9000, NUM_NEURONS)
    layers = [NeuronStats(9000, sums(), sums(), sums(), sums(), active, norm) for _ in range(NUM_LAYERS)]
    write_statistics(path, layers, lineage={})
    return scratch.save(path.stem, {path.name: path}, facts={}).files[0]
