"""One run, top to bottom: prepare it, skip it if it is committed already, else attempt and publish it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError, FFSplitError, StoreError
from ffsplit.measurement.gates import refusal
from ffsplit.models.load_options import attending, trusting
from ffsplit.progress import Progress
from ffsplit.run.checks import check_inputs
from ffsplit.run.job import Run, prepare
from ffsplit.run.tracking import Tracker
from ffsplit.store.artifact import locate, read_manifest
from ffsplit.store.cache import is_remote
from ffsplit.store.commits import LATEST_NAME, Kind, latest_commit, read_commit
from ffsplit.store.manifest import REPORT_NAME, Manifest
from ffsplit.store.scratch import Lease, Scratch
from ffsplit.store.signing import sign_manifest
from ffsplit.store.store import NOT_ATOMIC, Store, open_store

State = Literal["published", "committed already", "refused"]


class Finished(NamedTuple):
    """How a run ended. If gates refused it, nothing was published; `manifest` has the measurements.

    `report` is the key of its report in the store.
    """

    manifest: Manifest
    state: State
    report: str


def run_to_end(
    config: JobConfig,
    *,
    kind: Kind = "model",
    progress: Progress | None = None,
    sign_key: Path | None = None,
) -> Finished:
    """Run a job, unless its key is committed already. What its gates refuse is returned, not published.

    Raises ConfigError for a user's mistake, before anything is written, and other FFSplitErrors for failures
    while running. Finished work then stays in the scratch, and the next call for the same result resumes
    from it.
    """
    with (
        trusting(config.trust_remote_code),
        attending(config.attn_implementation),
        progress or Progress.to_user() as shown,
    ):
        if sign_key is not None:
            sign_manifest(b"{}", key=sign_key)  # fail early if the key cannot sign
        with shown.working("reading the model"):
            tracker = None if config.mlflow is None else Tracker(config.mlflow)
            run = prepare(config, kind=kind)
            run.needs.check()
            store, key = open_store(config.out), run.keys.published(kind)
        if _is_committed(store, key):
            shown.note(f"{store.uri}/{key} is committed already: nothing to do (--fresh runs it again)")
            finished = _standing(store, key)
        else:
            with shown.working("reading the text"):
                check_inputs(run)
            finished = _compute(run, store, shown, sign_key=sign_key)
        if finished.state != "refused":
            try:
                latest_commit(store)
            except FFSplitError as error:  # the artifact is committed anyway
                shown.note(f"warning: {LATEST_NAME} may be out of date until it is next read: {error}")
        if tracker is not None:
            _log_run(tracker, finished, store, shown)
        return finished


def _log_run(tracker: Tracker, finished: Finished, store: Store, shown: Progress) -> None:
    """Log to MLflow. A failure is only a warning, since the result is published anyway."""
    try:
        logged = tracker.log(finished.manifest, state=finished.state, store=store, report=finished.report)
        shown.note("MLflow has this run already" if logged is None else f"logged to MLflow as run {logged}")
    except FFSplitError as error:
        shown.note(f"warning: the run was not logged, the same command logs it later: {error}")


def _compute(run: Run, store: Store, shown: Progress, *, sign_key: Path | None) -> Finished:
    """Attempt the run and remove its scratch. If another run commits the same key first, return that one."""
    from ffsplit.run.pipeline import connected, make_attempt  # stages that a committed run does not need

    key, scratch = run.keys.published(run.kind), Scratch.of(store.uri, run.keys.scratch(run.kind))
    guarantees = store.check_writable()
    if guarantees.conditional_put != "atomic":
        shown.note(f"warning: {store.uri} {NOT_ATOMIC}")
    with connected(run) as runner, Lease(store, scratch, run_key=key, note=shown.note) as lease:
        try:
            manifest, report = make_attempt(
                run, runner, scratch, store=store, guarantees=guarantees, shown=shown, sign_key=sign_key
            )
            if refusal(manifest.gates) is not None:
                return Finished(manifest, "refused", report)
            finished = Finished(manifest, "published", report)
        except KeyboardInterrupt:
            if not run.config.fresh:
                shown.note("finished work is kept, and the same command resumes from it")
            raise
        except Exception:
            if not _was_committed_meanwhile(store, key):
                raise
            shown.note(f"{store.uri}/{key} was committed by another run of the same key meanwhile")
            finished = _standing(store, key)
        lease.remove_scratch()
    return finished


def _standing(store: Store, key: str) -> Finished:
    """What is committed under a key."""
    manifest = read_manifest(locate(f"{store.uri}/{key}"))
    return Finished(manifest, "committed already", f"{key}/{manifest.attempt}/{REPORT_NAME}")


def _is_committed(store: Store, key: str) -> bool:
    """Whether a run is committed. An unreadable directory is the user's mistake; an outage is not."""
    try:
        return read_commit(store, key) is not None
    except (ConfigError, StoreError) as error:
        if isinstance(error, StoreError) and is_remote(store.uri):
            raise
        raise ConfigError(f"--out: {error}") from error


def _was_committed_meanwhile(store: Store, key: str) -> bool:
    """Whether another run committed this key, so that this one's failure does not matter.

    If the store fails here again, the attempt's own failure is still the one to report.
    """
    with suppress(FFSplitError):
        return read_commit(store, key) is not None
    return False
