"""One run, from a checked job to a committed artifact, as the data flows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError, FFSplitError, GateError, StoreError
from ffsplit.measurement.gates import refusal
from ffsplit.models.load_options import attending, trusting
from ffsplit.progress import Progress
from ffsplit.run.estimate import estimate
from ffsplit.run.examine import examine
from ffsplit.run.prepare import check_weights, complete, identify
from ffsplit.store.commits import LATEST_NAME, Kind, latest_commit, read_commit
from ffsplit.store.entries import check_outside_attempts
from ffsplit.store.inputs import is_remote
from ffsplit.store.locate import locate, read_manifest
from ffsplit.store.manifest import REPORT_NAME, Manifest
from ffsplit.store.scratch import SCRATCH_PREFIX, Lease, Scratch
from ffsplit.store.signing import sign_manifest
from ffsplit.store.store import NOT_ATOMIC, Store, open_store

State = Literal["published", "committed already", "refused"]


class Finished(NamedTuple):
    """A run that ended. Of one that gates refused nothing was published; `manifest` says how it measured.

    `report` is the key of its report in the store.
    """

    manifest: Manifest
    state: State
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
    with (
        trusting(config.trust_remote_code),
        attending(config.attn_implementation),
        progress or Progress.to_stderr() as shown,
    ):
        store = open_store(config.out)
        check_outside_attempts(store.uri, flag="--out")
        if sign_key is not None:
            sign_manifest(b"{}", key=sign_key)  # a key that cannot sign is said before the work
        job = examine(config, kind=kind)
        flight = estimate(job, kind=kind)
        flight.check()
        identity = identify(job)
        key, work = identity.keys(kind)
        scratch = Scratch(uri=store.uri, prefix=f"{SCRATCH_PREFIX}/{work}")
        state: State = "committed already"
        manifest: Manifest | None = None
        if _is_committed(store, key):
            shown.note(f"{store.uri}/{key} is committed already: nothing to do (--fresh runs it again)")
        else:
            from ffsplit.run.attempt import Attempt  # the stages: a committed run needs none of them

            run = complete(job, identity, flight)
            check_weights(run.checkpoint, block_by_block=flight.block_by_block)
            guarantees = store.check_writable()
            if guarantees.conditional_put != "atomic":
                shown.note(f"warning: {store.uri} {NOT_ATOMIC}")
            attempt = Attempt(run, kind, key, scratch, store, guarantees, sign_key)
            with (
                attempt.connected() as runner,
                Lease(store, scratch, run_key=key, note=shown.note) as lease,
            ):
                try:
                    state, manifest = attempt.carry_out(runner, shown)
                    if state == "refused":
                        return Finished(manifest, state, attempt.refused_report)
                except Exception:
                    if not _was_committed_meanwhile(store, key):
                        raise
                    shown.note(f"{store.uri}/{key} was committed by another run of the same key meanwhile")
                lease.remove_scratch()
        try:
            latest_commit(store)
        except FFSplitError as error:  # the artifact stands
            shown.note(f"warning: {LATEST_NAME} may be behind until it is read: {error}")
        manifest = manifest or read_manifest(locate(f"{store.uri}/{key}"))
        report = f"{key}/{manifest.attempt}/{REPORT_NAME}"
        return Finished(manifest, state, report)


def _is_committed(store: Store, key: str) -> bool:
    """Whether a run has a commit. A directory that cannot be read is a mistake; an outage is not."""
    try:
        return read_commit(store, key) is not None
    except (ConfigError, StoreError) as error:
        if isinstance(error, StoreError) and is_remote(store.uri):
            raise
        raise ConfigError(f"--out: {error}") from error


def _was_committed_meanwhile(store: Store, key: str) -> bool:
    """Whether another run of this key made a failure of this one immaterial.

    A store that fails once more says nothing new: what the attempt failed of is what is told.
    """
    with suppress(FFSplitError):
        return read_commit(store, key) is not None
    return False
