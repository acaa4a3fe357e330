"""The tree of merges: the bytes of a reduction in one go, whatever the number of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import write_statistics
from ffsplit.run.stages import reduce
from ffsplit.run.stages.reduce import ReduceJob, merged, reduce_job, reduced
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Scratch

LINEAGE = {"model": "m"}


def shard(generator: np.random.Generator, *, num_layers: int = 2, num_neurons: int = 5) -> list[NeuronStats]:
    def sums() -> np.ndarray:
        return generator.lognormal(0, 9, num_neurons)  # sizes so far apart that the order of sums shows

    active = generator.integers(0, 9, num_neurons)
    norm = np.arange(1.0, num_neurons + 1)
    return [NeuronStats(9, sums(), sums(), sums(), sums(), active, norm) for _ in range(num_layers)]


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(uri=str(tmp_path / "out"), prefix=".scratch/key/reduce")


def parts_in(scratch: Scratch, folder: Path, count: int) -> list[FileEntry]:
    generator, parts = np.random.default_rng(count), []
    for index in range(count):
        path = folder / f"shard-{index}.parquet"
        write_statistics(path, shard(generator), lineage=LINEAGE)
        parts.append(scratch.save(path.stem, {path.name: path}, facts={}).files[0])
    return parts


def bytes_of(statistics: tuple[NeuronStats, ...], path: Path) -> bytes:
    write_statistics(path, statistics, lineage=LINEAGE)
    return path.read_bytes()


@pytest.mark.parametrize("count", [1, 4, 5, 16, 17, 18, 35, 63, 64, 65])
def test_the_tree_gives_the_bytes_of_one_reduction(
    count: int, scratch: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "FAN_IN", 4)
    parts, largest = parts_in(scratch, tmp_path, count), 0

    def run_tasks(jobs: list[ReduceJob]) -> list[object]:
        nonlocal largest
        largest = max(largest, *(len(job.parts) for job in jobs))
        return [reduce_job(job) for job in jobs]

    result = reduced(parts, lineage=LINEAGE, scratch=scratch, run_tasks=run_tasks)  # type: ignore[arg-type]
    assert largest <= 4
    assert bytes_of(result, tmp_path / "tree") == bytes_of(merged(parts, scratch), tmp_path / "once")


def test_the_order_of_sums_would_show(scratch: Scratch, tmp_path: Path) -> None:
    parts = parts_in(scratch, tmp_path, 9)
    forwards = bytes_of(merged(parts, scratch), tmp_path / "a")
    assert forwards != bytes_of(merged(parts[::-1], scratch), tmp_path / "b")
