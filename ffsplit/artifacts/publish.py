"""The commit protocol: how an artifact appears in a store whole, once, whoever else is publishing.

    <run key>/<attempt>/...       one attempt's files, manifest.json last
    <run key>/commit.json         created only if absent: names the attempt that won
    latest.json                   a hint to the newest committed model; the commits are the truth

An attempt without a commit is invisible to readers.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from ffsplit.artifacts.digests import list_files
from ffsplit.artifacts.manifest import MANIFEST_NAME, Manifest
from ffsplit.artifacts.paths import ATTEMPT_ID, RUN_KEY
from ffsplit.artifacts.stores import MissingKey, Store
from ffsplit.config import Record
from ffsplit.errors import ArtifactError, FFSplitError, StoreError

COMMIT_NAME = "commit.json"
LATEST_NAME = "latest.json"

Kind = Literal["model", "statistics"]


class Latest(Record):
    """The hint at the root of a store."""

    run_key: str = Field(pattern=f"^{RUN_KEY.pattern}$")
    attempt: str = Field(pattern=f"^{ATTEMPT_ID.pattern}$")
    committed_at: str = Field(description="UTC, ISO 8601")

    @field_validator("committed_at")
    @classmethod
    def _is_utc(cls, text: str) -> str:
        if datetime.fromisoformat(text).utcoffset() != timedelta(0):
            raise ValueError("is not in UTC")
        return text

    @property
    def order(self) -> tuple[datetime, str]:
        """Later commits compare greater; the run key decides a tie."""
        return datetime.fromisoformat(self.committed_at), self.run_key


class Commit(Latest):
    """What makes one attempt the result of its run."""

    schema_version: Literal[1] = 1
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    kind: Kind

    @property
    def hint(self) -> Latest:
        return Latest(run_key=self.run_key, attempt=self.attempt, committed_at=self.committed_at)


def new_attempt_id() -> str:
    """A random name for an attempt: 12 hex digits."""
    return secrets.token_hex(6)


def read_commit(store: Store, run_key: str) -> Commit | None:
    """The commit of a run, None when it has none. Raises ArtifactError when it cannot be understood."""
    key = f"{run_key}/{COMMIT_NAME}"
    try:
        commit = Commit.model_validate_json(store.get_bytes(key))
    except MissingKey:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        mend = "upgrade ffsplit, or delete the file and publish again"
        raise ArtifactError(f"{store.uri}/{key}: {where}: {first['msg']}: {mend}") from None
    if commit.run_key != run_key:
        raise ArtifactError(f"{store.uri}/{key} is the commit of another run, {commit.run_key}")
    return commit


def list_commits(store: Store) -> list[Commit]:
    """Every committed run of a store, oldest first. Costs one listing and one read a run."""
    run_keys = [name for name in store.list_directories("") if RUN_KEY.fullmatch(name)]
    commits = [commit for commit in (read_commit(store, run_key) for run_key in run_keys) if commit]
    return sorted(commits, key=lambda commit: commit.order)


def latest_commit(store: Store) -> Commit | None:
    """The newest committed model, None when there is none. Mends latest.json where it may be written."""
    models = [commit for commit in list_commits(store) if commit.kind == "model"]
    latest = models[-1] if models else None
    with suppress(FFSplitError):
        hint = _read_hint(store)
        if latest and hint != latest.hint:
            _write_hint(store, latest)
    return latest


def publish_attempt(
    store: Store,
    *,
    run_key: str,
    attempt: str,
    directory: Path,
    kind: Kind,
    move_latest: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Commit:
    """Publish a directory as the result of a run, and return the commit that stands in the end.

    That is another attempt's when one was first; then nothing of this attempt stays. Nothing stays
    either when an exception, KeyboardInterrupt included, strikes before the commit. `progress` is
    called with bytes done and bytes in all. Raises ArtifactError when the directory is not what its
    manifest says (names and sizes; digests are `verify`'s), StoreError when the store fails.
    """
    manifest_sha256, files = _check_attempt(directory, run_key=run_key, attempt=attempt, kind=kind)
    commit = read_commit(store, run_key)
    if commit is None:
        commit = Commit(
            run_key=run_key,
            attempt=attempt,
            manifest_sha256=manifest_sha256,
            kind=kind,
            committed_at=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        )
        _put_files(store, commit=commit, files=files, progress=progress)
        commit = _commit(store, commit)
    if move_latest and commit.kind == "model":
        _move_hint(store, commit)
    return commit


def _check_attempt(directory: Path, *, run_key: str, attempt: str, kind: Kind) -> tuple[str, dict[str, Path]]:
    """The manifest's sha256 and the files to publish, manifest.json last."""
    files = list_files(directory)
    if MANIFEST_NAME not in files:
        raise ArtifactError(f"{directory} has no {MANIFEST_NAME}")
    try:
        data = files[MANIFEST_NAME].read_bytes()
        present = {name: path.stat().st_size for name, path in files.items() if name != MANIFEST_NAME}
    except OSError as error:
        raise ArtifactError(f"cannot read {error.filename}: {error.strerror}") from error
    manifest = Manifest.from_json(data)
    if (manifest.run_key, manifest.attempt, manifest.kind) != (run_key, attempt, kind):
        found = f"the {manifest.kind} of {manifest.run_key}/{manifest.attempt}"
        raise ArtifactError(f"{directory} holds {found}, not the {kind} of {run_key}/{attempt}")
    files[MANIFEST_NAME] = files.pop(MANIFEST_NAME)
    listed = {entry.path: entry.size_bytes for entry in manifest.files}
    if listed != present:
        differing = ", ".join(sorted({name for name, _ in listed.items() ^ present.items()}))
        raise ArtifactError(f"{directory} is not what its manifest lists: {differing}")
    return hashlib.sha256(data).hexdigest(), files


def _put_files(
    store: Store,
    *,
    commit: Commit,
    files: dict[str, Path],
    progress: Callable[[int, int], None] | None,
) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    done = 0
    try:
        for name, path in files.items():
            store.put_file(f"{commit.run_key}/{commit.attempt}/{name}", path)
            done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
    except BaseException:
        _delete_attempt(store, commit)
        raise


def _commit(store: Store, commit: Commit) -> Commit:
    """Create commit.json if absent; what is read back decides who won.

    Not every S3 server makes If-None-Match atomic: of two writers that were both told yes, reading
    back lets the last be the winner for both.
    """
    key = f"{commit.run_key}/{COMMIT_NAME}"
    try:
        store.put_if_absent(key, _json(commit))
        winner = read_commit(store, commit.run_key)
        if winner is None:
            raise StoreError(f"{store.uri}/{key} was written but is not there: publish again")
    except BaseException:
        with suppress(FFSplitError):  # where the outcome cannot be learnt, files stay: a commit may name them
            standing = read_commit(store, commit.run_key)
            if standing is None or standing.attempt != commit.attempt:
                _delete_attempt(store, commit)
        raise
    if winner.attempt != commit.attempt:
        _delete_attempt(store, commit)
    return winner


def _delete_attempt(store: Store, commit: Commit) -> None:
    """Delete an attempt that did not win. A failure leaves an invisible orphan and hides no other error."""
    with suppress(FFSplitError):
        store.delete_prefix(f"{commit.run_key}/{commit.attempt}")


def _move_hint(store: Store, commit: Commit) -> None:
    """Point latest.json to a commit unless it names a newer one. Readers mend it, so failing is no error."""
    with suppress(FFSplitError):
        hint = _read_hint(store)
        if hint is None or hint.order < commit.order:
            _write_hint(store, commit)


def _read_hint(store: Store) -> Latest | None:
    try:
        return Latest.model_validate_json(store.get_bytes(LATEST_NAME))
    except (MissingKey, ValidationError):
        return None


def _write_hint(store: Store, commit: Commit) -> None:
    store.put_bytes(LATEST_NAME, _json(commit.hint))


def _json(record: Record) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()
