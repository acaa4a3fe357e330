"""One run, from a checked job to a committed artifact, as the data flows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from ffsplit import logs
from ffsplit.artifacts.commits import Kind, read_commit
from ffsplit.artifacts.digests import file_entries
from ffsplit.artifacts.entries import StoreGuarantees
from ffsplit.artifacts.index import latest_commit
from ffsplit.artifacts.locate import locate, read_manifest
from ffsplit.artifacts.manifest import MANIFEST_NAME, REPORT_NAME, SIGNATURE_NAME, Manifest
from ffsplit.artifacts.paths import check_outside_attempts
from ffsplit.artifacts.publish import Upload, new_attempt_id
from ffsplit.artifacts.scratch import SCRATCH_PREFIX, Scratch
from ffsplit.artifacts.signing import sign_manifest
from ffsplit.artifacts.statistics import STATISTICS_PATH
from ffsplit.artifacts.stores import NOT_ATOMIC, Store, open_store
from ffsplit.config import JobConfig
from ffsplit.distributed import make_runner
from ffsplit.errors import ConfigError, FFSplitError, GateError, StoreError
from ffsplit.gates import judge, refusal
from ffsplit.models.trust import trusting
from ffsplit.pipeline.documents import write_documents
from ffsplit.pipeline.placement import place
from ffsplit.pipeline.prepare import PreparedRun, check_weights, prepare
from ffsplit.preflight.words import in_one_line
from ffsplit.progress import Progress, StageLog
from ffsplit.temporary import full_disk_explained, temporary_folder

REFUSED_REPORT = f"refused/{REPORT_NAME}"
"""Where in the scratch the report of a result lies that its gates refused."""


class Finished(NamedTuple):
    """A run that ended. Of one that gates refused nothing was published; `manifest` says how it measured.

    `report` is the key of its report in the store.
    """

    manifest: Manifest
    state: Literal["published", "committed already", "refused"]
    report: str


def compress(
    config: JobConfig, *, progress: Progress | None = None, sign_key: Path | None = None
) -> Manifest:
    """Calibrate, split, compress, measure and publish. Returns the committed manifest.

    A run whose key is committed already is not run again. Raises ConfigError for a user's mistake,
    before anything is written, GateError for a result that does not pass its gates, and other
    FFSplitErrors for failures while running; what was finished by then stays in the scratch, where the
    next call that computes the same finds it. `sign_key` is a private key to sign the manifest with; it
    is not recorded anywhere.
    """
    finished = compress_judged(config, progress=progress, sign_key=sign_key)
    if finished.state == "refused":
        raise GateError(refusal(finished.manifest.gates) or "refused")
    return finished.manifest


def compress_judged(
    config: JobConfig, *, progress: Progress | None = None, sign_key: Path | None = None
) -> Finished:
    """As `compress`, but a result that does not pass its gates comes back with its measurements."""
    return _run(config, kind="model", progress=progress, sign_key=sign_key)


def calibrate(
    config: JobConfig, *, progress: Progress | None = None, sign_key: Path | None = None
) -> Manifest:
    """Collect and publish neuron statistics alone; `latest` never moves to them."""
    return _run(config, kind="statistics", progress=progress, sign_key=sign_key).manifest


def _run(config: JobConfig, *, kind: Kind, progress: Progress | None, sign_key: Path | None) -> Finished:
    with trusting(config.trust_remote_code), progress or Progress.to_stderr() as shown:
        store = open_store(config.out)
        check_outside_attempts(store.uri, flag="--out")
        if sign_key is not None:
            sign_manifest(b"{}", key=sign_key)  # a key that cannot sign is said before the work
        run = prepare(config, kind=kind)
        key, work = (run.run_key, run.work_key) if kind == "model" else (run.calibration_key,) * 2
        scratch = Scratch(uri=store.uri, prefix=f"{SCRATCH_PREFIX}/{work}")
        refused, is_new = None, not _is_committed(store, key)
        if is_new:
            check_weights(run.checkpoint, block_by_block=run.flight.block_by_block)
            guarantees = store.check_writable()
            if guarantees.conditional_put != "atomic":
                shown.note(f"warning: {store.uri} {NOT_ATOMIC}")
            try:
                refused = _carry_out(
                    run, key, scratch, store, guarantees, kind=kind, sign_key=sign_key, shown=shown
                )
            except Exception:
                if not _is_committed(store, key):
                    raise
                shown.note(f"{store.uri}/{key} was committed by another run of the same key meanwhile")
                is_new = False
        else:
            shown.note(f"{store.uri}/{key} is committed already: nothing to do (--fresh runs it again)")
        if refused is not None:
            return Finished(refused, "refused", scratch.key(REFUSED_REPORT))
        with suppress(FFSplitError):  # the artifact stands; the next run of this key cleans up
            store.delete_prefix(scratch.prefix)
            latest_commit(store)
        manifest = read_manifest(locate(f"{store.uri}/{key}"))
        report = f"{key}/{manifest.attempt}/{REPORT_NAME}"
        return Finished(manifest, "published" if is_new else "committed already", report)


def _is_committed(store: Store, key: str) -> bool:
    """Whether a run has a commit. A store that cannot be asked is a mistake in --out."""
    try:
        return read_commit(store, key) is not None
    except StoreError as error:
        raise ConfigError(f"--out: {error}") from None


def _carry_out(
    run: PreparedRun,
    key: str,
    scratch: Scratch,
    store: Store,
    guarantees: StoreGuarantees,
    *,
    kind: Kind,
    sign_key: Path | None,
    shown: Progress,
) -> Manifest | None:
    """Compute a run and publish it. Returns its manifest instead where its gates refuse it."""
    from ffsplit.pipeline.computation import compute_model, compute_statistics  # none for a committed run

    config, log = run.config, StageLog(shown)
    with (
        logs.fields(run=key),
        full_disk_explained(),
        make_runner(config) as runner,
        temporary_folder() as folder,
    ):
        shown.note(in_one_line(run.flight))
        shown.note(f"run {key}: {config.model} with recipe {run.recipe.name}, {run.budget}")
        attempt = new_attempt_id()
        staging = folder / attempt
        (staging / STATISTICS_PATH).parent.mkdir(parents=True)
        compute = compute_model if kind == "model" else compute_statistics
        run, outcome = compute(place(run, scratch, runner, log, shown=shown), staging)
        outcome = replace(outcome, guarantees=guarantees)
        if outcome.measurements is not None:
            outcome = replace(outcome, gates=judge(run.gates, outcome.measurements))
        write = partial(
            write_documents, run, outcome, staging, run_key=key, attempt=attempt, stages=log.stages
        )
        if refusal(outcome.gates) is not None:
            manifest = write(files=file_entries(staging))
            store.put_file(scratch.key(REFUSED_REPORT), staging / REPORT_NAME)
            return manifest
        logs.log("publishing", attempt=attempt)
        with Upload(store, run_key=key, attempt=attempt) as upload:
            write(files=upload.add(staging))
            if sign_key is not None:
                data = (staging / MANIFEST_NAME).read_bytes()
                (staging / SIGNATURE_NAME).write_bytes(sign_manifest(data, key=sign_key))
            upload.commit(staging, kind=kind, move_latest=kind == "model")
    return None
