"""One run, from a checked job to a committed artifact, as the data flows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from ffsplit.artifacts.commits import Kind, read_commit
from ffsplit.artifacts.locate import locate, read_manifest
from ffsplit.artifacts.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest, Measurements
from ffsplit.artifacts.publish import new_attempt_id, publish_attempt
from ffsplit.artifacts.scratch import SCRATCH_PREFIX, Result, Scratch
from ffsplit.artifacts.signing import sign_manifest
from ffsplit.artifacts.stores import NOT_ATOMIC, Store, open_store
from ffsplit.calibration.parquet import read_statistics, write_statistics
from ffsplit.calibration.sampling import shard
from ffsplit.calibration.statistics import NeuronStats, merge_layers, reduce_tree
from ffsplit.config import JobConfig, stage_key
from ffsplit.distributed import make_runner
from ffsplit.distributed.runner import Runner
from ffsplit.prepare import PreparedRun, prepare
from ffsplit.progress import Progress, StageLog
from ffsplit.publication import STATISTICS_PATH, Outcome, write_documents
from ffsplit.runtime.assemble import assemble, is_plain
from ffsplit.splitting.plan import LayerPlan, plan_split
from ffsplit.stages.calibrate import CalibrationJob, CalibrationWorker, Shard
from ffsplit.stages.compress import LayerJob, compress_layer_job
from ffsplit.stages.measure import MeasureJob, measure_job


def compress(
    config: JobConfig, *, progress: Progress | None = None, sign_key: Path | None = None
) -> Manifest:
    """Calibrate, split, compress, measure and publish. Returns the committed manifest.

    A run whose key is committed already is not run again. Raises ConfigError for a user's mistake,
    before anything is written, and other FFSplitErrors for failures while running; what was finished
    by then stays in the scratch, where the next call with the same key finds it. `sign_key` is a
    private key to sign the manifest with; it is not recorded anywhere.
    """
    return _run(config, kind="model", progress=progress, sign_key=sign_key)


def calibrate(
    config: JobConfig, *, progress: Progress | None = None, sign_key: Path | None = None
) -> Manifest:
    """Collect and publish neuron statistics alone; `latest` never moves to them."""
    return _run(config, kind="statistics", progress=progress, sign_key=sign_key)


def _run(config: JobConfig, *, kind: Kind, progress: Progress | None, sign_key: Path | None) -> Manifest:
    with progress or Progress.to_stderr() as shown:
        store = open_store(config.out)
        if sign_key is not None:
            sign_manifest(b"{}", key=sign_key)  # a key that cannot sign is said before the work
        run = prepare(config)
        key = run.run_key if kind == "model" else run.calibration_key
        if read_commit(store, key) is not None:
            shown.note(f"{store.uri}/{key} is committed already: nothing to do (--fresh runs it again)")
            return read_manifest(locate(f"{store.uri}/{key}"))
        guarantees = store.check_writable()
        if guarantees.conditional_put != "atomic":
            shown.note(f"warning: {store.uri} {NOT_ATOMIC}")
        shown.note(f"run {key}: {config.model} with recipe {run.recipe.name}, keep {run.keep:g}")
        log = StageLog(shown)
        with make_runner(config) as runner, tempfile.TemporaryDirectory(prefix="ffsplit-") as folder:
            attempt = new_attempt_id()
            staging = Path(folder) / attempt
            (staging / STATISTICS_PATH).parent.mkdir(parents=True)
            outcome = _compute(run, key, kind=kind, runner=runner, log=log, staging=staging)
            outcome = replace(outcome, guarantees=guarantees)
            write_documents(run, outcome, staging, run_key=key, attempt=attempt, stages=log.stages)
            if sign_key is not None:
                data = (staging / MANIFEST_NAME).read_bytes()
                (staging / SIGNATURE_NAME).write_bytes(sign_manifest(data, key=sign_key))
            publish_attempt(
                store, run_key=key, attempt=attempt, directory=staging, kind=kind, move_latest=kind == "model"
            )
        _clean(store, key)
        return read_manifest(locate(f"{store.uri}/{key}"))


def _compute(
    run: PreparedRun, key: str, *, kind: Kind, runner: Runner, log: StageLog, staging: Path
) -> Outcome:
    """Everything between the checks and the publication; the checkpoint ends up in `staging`."""
    scratch = Scratch(uri=open_store(run.config.out).uri, prefix=f"{SCRATCH_PREFIX}/{key}")
    shards = _calibrate(run, scratch, runner, log)
    statistics = _reduce(run, scratch, shards, staging / STATISTICS_PATH)
    num_tokens = sum(int(str(result.facts["num_tokens"])) for result in shards)
    if kind == "statistics":
        return Outcome(kind=kind, statistics=statistics, num_tokens=num_tokens, num_shards=len(shards))
    plans = plan_split(statistics, run.layouts, score=run.recipe.score)
    layers = _compress(run, scratch, plans, shards, runner, log)
    assemble(run.checkpoint, [scratch.path(layer.files[0]) for layer in layers], run.layouts, staging)
    measured = _measure(run, staging, runner, log)
    return Outcome(
        kind=kind,
        statistics=statistics,
        num_tokens=num_tokens,
        num_shards=len(shards),
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
    )
    answers = runner.map_workers("calibrate", partial(CalibrationWorker, job), shards)
    return log.collect("calibrate", run.calibration_key, len(shards), answers)


def _reduce(
    run: PreparedRun, scratch: Scratch, shards: list[Result], target: Path
) -> tuple[NeuronStats, ...]:
    """Merge the shards' statistics in their order, along a fixed tree, into one Parquet file."""
    per_shard = (read_statistics(scratch.path(_statistics_file(result))) for result in shards)
    statistics = reduce_tree(per_shard, merge_layers)
    write_statistics(target, statistics, lineage=_lineage(run) | {"num_shards": str(len(shards))})
    return statistics


def _compress(
    run: PreparedRun,
    scratch: Scratch,
    plans: tuple[LayerPlan, ...],
    shards: list[Result],
    runner: Runner,
    log: StageLog,
) -> list[Result]:
    plain = is_plain(run.checkpoint, run.layouts)
    jobs = [
        LayerJob(
            model_directory=str(run.checkpoint.directory),
            plan=plan,
            steps=run.recipe.steps,
            plain=plain,
            inputs=tuple(_inputs_files(shards, plan.layer)),
            scratch=_stage(scratch, "compress"),
            profile=run.profile,
        )
        for plan in plans
    ]
    key = stage_key(
        "compress", {"run": run.run_key, "plans": [plan.model_dump(mode="json") for plan in plans]}
    )
    return log.collect("compress", key, len(jobs), runner.map_tasks("compress", compress_layer_job, jobs))


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
