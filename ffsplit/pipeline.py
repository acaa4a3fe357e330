"""One run, from a checked job to a committed artifact, as the data flows."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from ffsplit.artifacts.locate import locate, read_manifest
from ffsplit.artifacts.manifest import FileEntry, Manifest, Measurements
from ffsplit.artifacts.publish import Kind, new_attempt_id, publish_attempt, read_commit
from ffsplit.artifacts.scratch import SCRATCH_PREFIX, Result, Scratch
from ffsplit.artifacts.statistics import STATISTICS_PATH
from ffsplit.artifacts.stores import Store, open_store
from ffsplit.calibration.parquet import read_statistics, write_statistics
from ffsplit.calibration.sampling import shard
from ffsplit.calibration.statistics import NeuronStats, merge_layers, reduce_tree
from ffsplit.config import JobConfig, stage_key
from ffsplit.distributed import make_runner
from ffsplit.distributed.runner import Runner
from ffsplit.errors import ConfigError
from ffsplit.prepare import PreparedRun, prepare, settle
from ffsplit.progress import Progress, StageLog
from ffsplit.publication import Outcome, write_documents
from ffsplit.runtime.assemble import assemble, is_plain
from ffsplit.splitting.allocation import Candidate, propose
from ffsplit.splitting.plan import LayerPlan, plan_split
from ffsplit.stages.allocate import Allocation, JudgeJob, allocate
from ffsplit.stages.calibrate import CalibrationJob, CalibrationWorker, Shard
from ffsplit.stages.compress import LayerJob, compress_layer_job
from ffsplit.stages.measure import MeasureJob, measure_job


def compress(config: JobConfig, *, progress: Progress | None = None) -> Manifest:
    """Calibrate, split, compress, measure and publish. Returns the committed manifest.

    A run whose key is committed already is not run again. Raises ConfigError for a user's mistake,
    before anything is written, and other FFSplitErrors for failures while running; what was finished
    by then stays in the scratch, where the next call with the same key finds it.
    """
    return _run(config, kind="model", progress=progress)


def calibrate(config: JobConfig, *, progress: Progress | None = None) -> Manifest:
    """Collect and publish neuron statistics alone; `latest` never moves to them."""
    return _run(config, kind="statistics", progress=progress)


def _run(config: JobConfig, *, kind: Kind, progress: Progress | None) -> Manifest:
    if kind == "statistics" and config.stats is not None:
        raise ConfigError("--stats is for compress: calibrate collects statistics of its own")
    with progress or Progress.to_stderr() as shown:
        store = open_store(config.out)
        run = prepare(config)
        key = run.run_key if kind == "model" else run.calibration_key
        if read_commit(store, key) is not None:
            shown.note(f"{store.uri}/{key} is committed already: nothing to do (--fresh runs it again)")
            return read_manifest(locate(f"{store.uri}/{key}"))
        store.check_writable()
        shown.note(f"run {key}: {config.model} with recipe {run.recipe.name}, {run.budget}")
        log = StageLog(shown)
        with make_runner(config) as runner, tempfile.TemporaryDirectory(prefix="ffsplit-") as folder:
            attempt = new_attempt_id()
            staging = Path(folder) / attempt
            (staging / STATISTICS_PATH).parent.mkdir(parents=True)
            run, outcome = _compute(run, key, kind=kind, runner=runner, log=log, staging=staging)
            write_documents(run, outcome, staging, run_key=key, attempt=attempt, stages=log.stages)
            publish_attempt(
                store, run_key=key, attempt=attempt, directory=staging, kind=kind, move_latest=kind == "model"
            )
        _clean(store, key)
        return read_manifest(locate(f"{store.uri}/{key}"))


def _compute(
    run: PreparedRun, key: str, *, kind: Kind, runner: Runner, log: StageLog, staging: Path
) -> tuple[PreparedRun, Outcome]:
    """Everything between the checks and the publication; the checkpoint ends up in `staging`.

    The run comes back with the layouts that were settled on.
    """
    scratch = Scratch(uri=open_store(run.config.out).uri, prefix=f"{SCRATCH_PREFIX}/{key}")
    shards = _calibrate(run, scratch, runner, log)
    statistics = _reduce(run, scratch, shards, staging / STATISTICS_PATH)
    num_tokens = sum(int(str(result.facts["num_tokens"])) for result in shards)
    if kind == "statistics":
        return run, Outcome(kind=kind, statistics=statistics, num_tokens=num_tokens, num_shards=len(shards))
    run, place, allocation = settle(run, statistics), _stage(scratch, "compress"), None
    if run.recipe.allocation == "search":
        found = _allocate(run, scratch, statistics, shards, runner, log, staging.with_name("candidates"))
        run, allocation = replace(run, layouts=found.chosen.layouts), found.record
        place = _stage(scratch, f"allocate/{found.chosen.name}")
    plans = plan_split(statistics, run.layouts, score=run.recipe.score)
    jobs = _layer_jobs(run, place, plans, shards)
    key = stage_key(
        "compress", {"run": run.run_key, "plans": [plan.model_dump(mode="json") for plan in plans]}
    )
    layers = log.collect("compress", key, len(jobs), runner.map_tasks("compress", compress_layer_job, jobs))
    assemble(run.checkpoint, [scratch.path(layer.files[0]) for layer in layers], run.layouts, staging)
    measured = _measure(run, staging, runner, log)
    return run, Outcome(
        kind=kind,
        statistics=statistics,
        num_tokens=num_tokens,
        num_shards=len(shards),
        allocation=allocation,
        plans=plans,
        errors=tuple(float(str(layer.facts["relative_error"])) for layer in layers),
        measurements=measured,
    )


def _calibrate(run: PreparedRun, scratch: Scratch, runner: Runner, log: StageLog) -> list[Result]:
    settings = run.recipe.calibration
    shards = [
        Shard(i, rows) for i, rows in enumerate(shard(run.text.calibration, shard_size=settings.shard_size))
    ]
    job = CalibrationJob(
        model_directory=str(run.checkpoint.directory),
        settings=settings,
        num_shards=len(shards),
        seed=run.config.seed,
        lineage=_lineage(run),
        profile=run.profile,
        scratch=_stage(scratch, "calibrate"),
        inputs_only=run.origin is not None,
    )
    name = "calibrate"
    if job.inputs_only:
        name, shards = "sample", [shard for shard in shards if job.num_sampled(shard.index)]
    answers = runner.map_workers(name, partial(CalibrationWorker, job), shards)
    return log.collect(name, run.calibration_key, len(shards), answers)


def _reduce(
    run: PreparedRun, scratch: Scratch, shards: list[Result], target: Path
) -> tuple[NeuronStats, ...]:
    """Merge the shards' statistics in their order, along a fixed tree, into one Parquet file.

    Statistics of an earlier run are taken as they are, to the byte.
    """
    if run.origin is not None:
        shutil.copyfile(run.origin.path, target)
        return read_statistics(target)
    per_shard = (read_statistics(scratch.path(_statistics_file(result))) for result in shards)
    statistics = reduce_tree(per_shard, merge_layers)
    write_statistics(target, statistics, lineage=_lineage(run) | {"num_shards": str(len(shards))})
    return statistics


def _layer_jobs(
    run: PreparedRun, place: Scratch, plans: tuple[LayerPlan, ...], shards: list[Result]
) -> list[LayerJob]:
    plain = is_plain(run.checkpoint, [plan.layout for plan in plans])
    return [
        LayerJob(
            model_directory=str(run.checkpoint.directory),
            plan=plan,
            steps=run.recipe.steps,
            plain=plain,
            inputs=tuple(_inputs_files(shards, plan.layer)),
            scratch=place,
            profile=run.profile,
        )
        for plan in plans
    ]


def _allocate(
    run: PreparedRun,
    scratch: Scratch,
    statistics: tuple[NeuronStats, ...],
    shards: list[Result],
    runner: Runner,
    log: StageLog,
    folder: Path,
) -> Allocation:
    """Search for a better way than uniform to share the budget out over the layers."""
    candidates = propose(run.solver, run.budget, statistics, uniform=run.layouts)

    def compress(candidate: Candidate) -> list[Result]:
        plans = plan_split(statistics, candidate.layouts, score=run.recipe.score)
        jobs = _layer_jobs(run, _stage(scratch, f"allocate/{candidate.name}"), plans, shards)
        answers = dict(runner.map_tasks("allocate", compress_layer_job, jobs))
        return [answers[index] for index in range(len(jobs))]

    settings = run.recipe.calibration
    with log.stage("allocate", stage_key("allocate", {"run": run.run_key}), num_items=len(candidates)):
        return allocate(
            candidates,
            checkpoint=run.checkpoint,
            model=run.solver.model,
            compress=compress,
            layer_file=lambda result: scratch.path(result.files[0]),
            job=JudgeJob(
                original_directory=str(run.checkpoint.directory),
                candidate_directories=(),
                rows=run.text.judged,
                max_length=settings.max_length,
                batch_tokens=settings.batch_tokens,
                profile=run.profile,
            ),
            runner=runner,
            folder=folder,
        )


def _measure(run: PreparedRun, staging: Path, runner: Runner, log: StageLog) -> Measurements:
    job = MeasureJob(
        original_directory=str(run.checkpoint.directory),
        compressed_directory=str(staging),
        layouts=run.layouts,
        held_out=run.text.held_out,
        max_length=run.recipe.calibration.max_length,
        batch_tokens=run.recipe.calibration.batch_tokens,
        settings=run.recipe.measurement,
        profile=run.profile,
    )
    with log.stage("measure", stage_key("measure", {"run": run.run_key}), num_items=1):
        return runner.run_alone("measure", measure_job, job)


def _clean(store: Store, key: str) -> None:
    """Remove the scratch of a committed run."""
    store.delete_prefix(f"{SCRATCH_PREFIX}/{key}")


def _stage(scratch: Scratch, name: str) -> Scratch:
    return scratch.model_copy(update={"prefix": f"{scratch.prefix}/{name}"})


def _lineage(run: PreparedRun) -> dict[str, str]:
    """What the statistics are made from: no time, no host, no number of workers."""
    return run.digests | {"calibration": run.calibration_key}


def _statistics_file(result: Result) -> FileEntry:
    (entry,) = (entry for entry in result.files if entry.path.endswith(".parquet"))
    return entry


def _inputs_files(shards: list[Result], layer: int) -> list[FileEntry]:
    """The sampled inputs of one layer, in shard order."""
    folder = f"/inputs/layer-{layer:03d}/"
    return [entry for result in shards for entry in result.files if folder in entry.path]
