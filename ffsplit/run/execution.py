"""The stages of one run, as its runner carries them out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ffsplit.calibration.parquet import read_statistics, write_statistics
from ffsplit.calibration.sampling import shard
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compressors import AnyCompressor
from ffsplit.distributed.runner import Runner
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.healing.settings import HealingSettings
from ffsplit.keys import stage_key
from ffsplit.measurement.gates import speed_limits
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.locate import ModelSource, described, staged
from ffsplit.progress import StageLog
from ffsplit.run.prepare import PreparedRun, healing_threads
from ffsplit.run.stages.calibrate import CalibrationJob, CalibrationWorker, Shard
from ffsplit.run.stages.fit import LayerJob, compress_layer_job
from ffsplit.run.stages.heal import HealJob, heal_job
from ffsplit.run.stages.measure import MeasureJob, measure_job
from ffsplit.run.stages.reduce import ReduceJob, reduce_job, reduced
from ffsplit.run.stages.search import Allocation, JudgeJob, allocate
from ffsplit.runtime.assemble import keeps_names
from ffsplit.splitting.proposal import UNIFORM, Candidate, propose
from ffsplit.splitting.scores import LayerPlan, plan_split
from ffsplit.store.entries import FileEntry
from ffsplit.store.manifest import Measurements
from ffsplit.store.scratch import Result, Scratch


class Layers(NamedTuple):
    """The compressed layers of a model: a file each, how it is stored, and its error."""

    files: tuple[Path, ...]
    layouts: tuple[LayerLayout, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Execution:
    """Runs the stages of a prepared run; their results are kept below `scratch`."""

    run: PreparedRun
    scratch: Scratch
    runner: Runner
    log: StageLog
    model: ModelSource

    def calibrate(self) -> list[Result]:
        """Statistics and sampled FFN inputs of every shard; the inputs alone where there are statistics."""
        if self.run.origin is not None:
            return self.sample(self.model, place="calibrate", key=self.run.calibration_key)
        job, shards = self._calibration(self.model, place="calibrate")
        answers = self.runner.map_workers("calibrate", partial(CalibrationWorker, job), shards)
        return self.log.collect("calibrate", self.run.calibration_key, len(shards), answers)

    def sample(self, model: ModelSource, *, place: str, key: str) -> list[Result]:
        """The FFN inputs of the sampled tokens alone, of the original or of a compressed model."""
        job, shards = self._calibration(model, place=place, inputs_only=True)
        shards = [each for each in shards if job.num_sampled(each.index)]
        answers = self.runner.map_workers("sample", partial(CalibrationWorker, job), shards)
        return self.log.collect("sample", key, len(shards), answers)

    def _calibration(
        self, model: ModelSource, *, place: str, inputs_only: bool = False
    ) -> tuple[CalibrationJob, list[Shard]]:
        run, settings = self.run, self.run.recipe.calibration
        groups = shard(run.text.calibration, shard_size=settings.rows_a_shard)
        job = CalibrationJob(
            model=model,
            settings=settings,
            num_shards=len(groups),
            seed=run.config.seed,
            lineage=lineage(run),
            profile=run.profile,
            scratch=self.place(place),
            inputs_only=inputs_only,
            block_by_block=run.flight.block_by_block,
        )
        return job, [Shard(index, rows) for index, rows in enumerate(groups)]

    def reduce(self, shards: Sequence[Result], target: Path) -> tuple[NeuronStats, ...]:
        """Merge the shards' statistics in their order, along a fixed tree, into one Parquet file.

        More than FAN_IN of them are first made fewer by tasks. Statistics of an earlier run are taken
        as they are, to the byte.
        """
        if self.run.origin is not None:
            shutil.copyfile(self.run.origin.path, target)
            return read_statistics(target)
        facts = lineage(self.run)

        def run_tasks(jobs: Sequence[ReduceJob]) -> list[Result]:
            answers = self.runner.map_tasks("reduce", reduce_job, jobs)
            return self.log.collect("reduce", self.run.calibration_key, len(jobs), answers)

        parts = [_statistics_file(result) for result in shards]
        statistics = reduced(parts, lineage=facts, scratch=self.place("reduce"), run_tasks=run_tasks)
        write_statistics(target, statistics, lineage=facts | {"num_shards": str(len(shards))})
        return statistics

    def allocate(
        self, statistics: tuple[NeuronStats, ...], shards: Sequence[Result], *, folder: Path
    ) -> Allocation:
        """Search for a better way than uniform to share the budget out over the layers."""
        run = self.run
        settings, key = run.recipe.calibration, stage_key("allocate", {"run": run.run_key})
        uniform = Candidate(UNIFORM, run.layouts)

        def compress(candidate: Candidate) -> list[Path]:
            plans = plan_split(statistics, candidate.layouts, score=run.recipe.score)
            place = self.place(place_of(candidate))
            jobs = self._layer_jobs(run.checkpoint, run.recipe.steps, plans, shards, place)
            answers = dict(self.runner.map_tasks("allocate", compress_layer_job, jobs))
            return [self.scratch.path(answers[index].files[0]) for index in range(len(jobs))]

        with self.log.stage("allocate", key, num_items=1):
            return allocate(
                uniform,
                checkpoint=run.checkpoint,
                model=run.solver.model,
                propose=lambda errors: propose(run.solver, run.budget, errors, uniform=run.layouts),
                compress=compress,
                hand_over=self.hand_over,
                job=JudgeJob(
                    original=self.model,
                    candidates=(),
                    rows=run.text.judged,
                    max_length=settings.row_length,
                    batch_tokens=settings.batch_tokens,
                    profile=run.profile,
                ),
                runner=self.runner,
                folder=folder,
            )

    def compress(
        self,
        stage: str,
        checkpoint: Checkpoint,
        steps: tuple[AnyCompressor, ...],
        plans: tuple[LayerPlan, ...],
        shards: Sequence[Result],
        *,
        place: str,
    ) -> Layers:
        """Compress every layer of a checkpoint, one task each."""
        jobs = self._layer_jobs(checkpoint, steps, plans, shards, self.place(place))
        planned = [plan.model_dump(mode="json") for plan in plans]
        key = stage_key(stage, {"run": self.run.run_key, "plans": planned})
        answers = self.runner.map_tasks(stage, compress_layer_job, jobs)
        return self.layers(self.log.collect(stage, key, len(jobs), answers))

    def layers(self, results: Sequence[Result]) -> Layers:
        """What the tasks of a stage have left in the scratch."""
        return Layers(
            files=tuple(self.scratch.path(result.files[0]) for result in results),
            layouts=tuple(LayerLayout.model_validate(result.facts["layout"]) for result in results),
            errors=tuple(float(str(result.facts["relative_error"])) for result in results),
        )

    def heal(self, settings: HealingSettings, compressed: Path) -> Result:
        """Heal the checkpoint in a directory; the result's file holds its new weights."""
        run, calibration = self.run, self.run.recipe.calibration
        threads = healing_threads(run.config)
        job = HealJob(
            original=self.model,
            compressed=self.hand_over(compressed),
            rows=run.text.calibration,
            validation=run.text.judged or run.text.held_out,
            max_length=calibration.row_length,
            batch_tokens=calibration.batch_tokens,
            seed=run.config.seed,
            settings=settings,
            quantization=run.recipe.after_healing,
            linears=run.recipe.linears,
            scratch=self.place("heal"),
            profile=run.profile,
            threads=threads,
            workers=run.config.healing_workers,
        )
        with self.log.stage("heal", stage_key("heal", {"run": run.run_key}), num_items=1):
            healed = self.runner.run_together("heal", heal_job, job, size=job.workers, threads=threads)
        assert healed is not None, "the first worker answers with the result"
        return healed

    def measure(self, compressed: Path, layouts: tuple[LayerLayout, ...]) -> Measurements:
        """Compare the checkpoint in a directory with the original."""
        run, calibration = self.run, self.run.recipe.calibration
        job = MeasureJob(
            original=self.model,
            compressed=self.hand_over(compressed),
            layouts=layouts,
            held_out=run.text.held_out,
            evaluations=run.evaluations,
            max_length=calibration.row_length,
            batch_tokens=calibration.batch_tokens,
            settings=run.recipe.measurement,
            speed_limits=speed_limits(run.gates),
            profile=run.profile,
            block_by_block=run.flight.measured_block_by_block,
        )
        with self.log.stage("measure", stage_key("measure", {"run": run.run_key}), num_items=1):
            return self.runner.run_alone("measure", measure_job, job, reserved=True)

    def place(self, name: str) -> Scratch:
        """The part of the scratch that belongs to a stage."""
        return self.scratch.place(name)

    def hand_over(self, directory: Path) -> ModelSource:
        """A checkpoint that this process has put together, for a worker on any host."""
        if not self.runner.is_spread:
            return ModelSource(path=str(directory))
        return staged(described(directory), self.place(f"checkpoints/{directory.name}"), once=False)

    def _layer_jobs(
        self,
        checkpoint: Checkpoint,
        steps: tuple[AnyCompressor, ...],
        plans: tuple[LayerPlan, ...],
        shards: Sequence[Result],
        place: Scratch,
    ) -> list[LayerJob]:
        plain = keeps_names(checkpoint, [plan.layout for plan in plans])
        ours = checkpoint.directory == self.run.checkpoint.directory
        model = self.model if ours else self.hand_over(checkpoint.directory)
        return [
            LayerJob(
                model=model,
                plan=plan,
                steps=steps,
                plain=plain,
                inputs=tuple(input_files(shards, checkpoint.ffns[plan.layer].unit)),
                scratch=place,
                profile=self.run.profile,
            )
            for plan in plans
        ]


def place_of(candidate: Candidate) -> str:
    """Where the layers of a candidate are, below the scratch."""
    return f"allocate/{candidate.name}"


def lineage(run: PreparedRun) -> dict[str, str]:
    """What the statistics are made from: no time, no host, no number of workers."""
    return run.digests | {"calibration": run.calibration_key}


def _statistics_file(result: Result) -> FileEntry:
    (entry,) = (entry for entry in result.files if entry.path.endswith(".parquet"))
    return entry


def input_files(shards: Sequence[Result], unit: int) -> list[FileEntry]:
    """The sampled inputs of one FFN, or of a block's experts, in shard order."""
    folder = f"/inputs/layer-{unit:03d}/"
    return [entry for result in shards for entry in result.files if folder in entry.path]
