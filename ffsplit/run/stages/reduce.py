"""The reduction: statistics of many shards merged along one fixed tree, a bounded number of files per task.

A task takes FAN_IN neighbours. FAN_IN is a power of two, so each result is a node of the binary tree over all
shards, and the bytes do not depend on which task computes which part. No task, nor the driver, ever holds the
statistics of more than log2(shards) shards, or reads more than FAN_IN files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.calibration.sampling import FAN_IN
from ffsplit.calibration.statistics import NeuronStats, merge_layers, reduce_tree
from ffsplit.calibration.statistics_file import read_statistics, write_statistics
from ffsplit.config import Record
from ffsplit.directories import temporary_folder
from ffsplit.run.stages.calibrate import statistics_file
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution


class ReduceJob(Record):
    """Neighbouring parts of the statistics, in order."""

    level: int
    index: int
    parts: tuple[FileEntry, ...]
    lineage: dict[str, str]
    scratch: Scratch

    @property
    def name(self) -> str:
        return f"level-{self.level}-{self.index:05d}"


def reduced(
    parts: Sequence[FileEntry],
    *,
    lineage: dict[str, str],
    scratch: Scratch,
    run_tasks: Callable[[Sequence[ReduceJob]], Sequence[Result]],
) -> tuple[NeuronStats, ...]:
    """The statistics of all parts, merged by tasks while there are more than FAN_IN, then in this process."""
    level = 0
    while len(parts) > FAN_IN:
        level += 1
        groups = [tuple(parts[start : start + FAN_IN]) for start in range(0, len(parts), FAN_IN)]
        results = run_tasks(
            [
                ReduceJob(level=level, index=index, parts=group, lineage=lineage, scratch=scratch)
                for index, group in enumerate(groups)
            ]
        )
        parts = [result.files[0] for result in results]
    return merged(parts, scratch)


def reduce_job(job: ReduceJob) -> Result:
    """Merge the parts into one Parquet file in the scratch."""
    return job.scratch.load_or_compute(job.name, lambda: _reduce(job))


def _reduce(job: ReduceJob) -> Result:
    with temporary_folder() as folder:
        path = folder / f"{job.name}.parquet"
        write_statistics(path, merged(job.parts, job.scratch), lineage=job.lineage | {"part": job.name})
        return job.scratch.save(job.name, {path.name: path}, facts={"num_parts": len(job.parts)})


def merged(parts: Sequence[FileEntry], scratch: Scratch) -> tuple[NeuronStats, ...]:
    """The statistics of all parts, read one after another."""

    def read(entry: FileEntry) -> tuple[NeuronStats, ...]:
        with scratch.reading(entry) as path:
            return read_statistics(path)

    return reduce_tree(map(read, parts), merge_layers)


def reduce_statistics(
    execution: Execution, shards: Sequence[Result], target: Path
) -> tuple[NeuronStats, ...]:
    """Merge the shards' statistics in their order into one Parquet file.

    Statistics of an earlier run are copied unchanged.
    """
    run = execution.run
    if run.origin is not None:
        shutil.copyfile(run.origin.path, target)
        return read_statistics(target)

    def run_tasks(jobs: Sequence[ReduceJob]) -> list[Result]:
        answers = execution.runner.map_tasks("reduce", reduce_job, jobs)
        return execution.log.collect("reduce", run.keys.statistics, len(jobs), answers)

    parts, scratch = [statistics_file(result) for result in shards], execution.scratch.part("reduce")
    statistics = reduced(parts, lineage=run.lineage, scratch=scratch, run_tasks=run_tasks)
    write_statistics(target, statistics, lineage=run.lineage | {"num_shards": str(len(shards))})
    return statistics
