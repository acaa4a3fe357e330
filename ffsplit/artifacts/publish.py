"""The commit protocol: how an artifact appears in a store whole, once, whoever else is publishing.

    <run key>/<attempt>/...       one attempt's files, manifest.json last
    <run key>/commit.json         created only if absent: names the attempt that won
    latest.json                   a hint to the newest committed model; the commits are the truth
    index.json                    a summary of every commit, rebuilt from them when behind

An attempt without a commit is invisible to readers.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from ffsplit.artifacts.commits import COMMIT_NAME, Commit, Kind, read_commit, record_bytes
from ffsplit.artifacts.digests import list_files
from ffsplit.artifacts.index import add_to_index, move_hint
from ffsplit.artifacts.manifest import MANIFEST_NAME, UNLISTED, Manifest
from ffsplit.artifacts.stores import Store
from ffsplit.errors import ArtifactError, FFSplitError, StoreError

NUM_FILES_AT_ONCE = 4


def new_attempt_id() -> str:
    """A random name for an attempt: 12 hex digits."""
    return secrets.token_hex(6)


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
    manifest, manifest_sha256, files = _check_attempt(directory, run_key=run_key, attempt=attempt, kind=kind)
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
        if commit.attempt == attempt:
            add_to_index(store, commit, manifest)
    if move_latest and commit.kind == "model":
        move_hint(store, commit)
    return commit


def _check_attempt(
    directory: Path, *, run_key: str, attempt: str, kind: Kind
) -> tuple[Manifest, str, dict[str, Path]]:
    """The manifest, its sha256 and the files to publish, manifest.json last."""
    files = list_files(directory)
    if MANIFEST_NAME not in files:
        raise ArtifactError(f"{directory} has no {MANIFEST_NAME}")
    try:
        data = files[MANIFEST_NAME].read_bytes()
        present = {name: path.stat().st_size for name, path in files.items() if name not in UNLISTED}
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
    return manifest, hashlib.sha256(data).hexdigest(), files


def _put_files(
    store: Store,
    *,
    commit: Commit,
    files: dict[str, Path],
    progress: Callable[[int, int], None] | None,
) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    done, lock = 0, threading.Lock()

    def put(name: str) -> None:
        nonlocal done
        store.put_file(f"{commit.run_key}/{commit.attempt}/{name}", files[name])
        with lock:
            done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))

    try:
        with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
            tasks = [pool.submit(put, name) for name in files if name != MANIFEST_NAME]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
        put(MANIFEST_NAME)
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
        store.put_if_absent(key, record_bytes(commit))
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
