"""The commit protocol: an artifact appears in a store completely and once, even with concurrent publishers.

    <run key>/<attempt>/...       one attempt's files, manifest.json last
    <run key>/commit.json         created only if absent: names the attempt that won
    latest.json                   a hint to the newest committed model; the commits are the truth
    index.json                    a summary of every commit, rebuilt from the commits when out of date

An attempt without a commit is invisible to readers.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType

from ffsplit import logs
from ffsplit.errors import ArtifactError, FFSplitError, StoreError
from ffsplit.store.commits import (
    COMMIT_NAME,
    INDEX_NAME,
    LATEST_NAME,
    Commit,
    Kind,
    add_to_index,
    move_hint,
    read_commit,
    read_hint,
    record_bytes,
)
from ffsplit.store.entries import MANIFEST_NAME, UNLISTED, FileEntry, file_entry, list_files
from ffsplit.store.manifest import Manifest
from ffsplit.store.store import Store

NUM_FILES_AT_ONCE = 4
NUM_HASHERS = 2


def new_attempt_id() -> str:
    """A random name for an attempt: 12 hex digits."""
    return secrets.token_hex(6)


class Upload:
    """The upload of an attempt. Files are hashed while they are sent.

        with Upload(store, run_key=run_key, attempt=attempt) as upload:
            files = upload.add(directory)                  # returns when all are hashed; still sending
            ...                                            # write the manifest that lists them
            upload.commit(directory, kind="model", move_latest=True)

    If the block ends without a commit, even by KeyboardInterrupt, all files of the attempt are deleted. If
    the run is already committed, nothing is sent. `progress` is called with bytes done and total bytes.
    """

    def __init__(
        self, store: Store, *, run_key: str, attempt: str, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._store, self._run_key, self._attempt, self._progress = store, run_key, attempt, progress
        self._standing: Commit | None = None
        self._is_open = True
        self._entries: dict[str, FileEntry] = {}
        self._sent: dict[str, Future[None]] = {}
        self._done = self._total = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_FILES_AT_ONCE, thread_name_prefix="ffsplit-upload")

    def __enter__(self) -> Upload:
        self._standing = read_commit(self._store, self._run_key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._is_open and self._sent:
            _delete_attempt(self._store, run_key=self._run_key, attempt=self._attempt)

    def add(self, directory: Path) -> tuple[FileEntry, ...]:
        """Start sending every file of a directory that was not added before, and hash them meanwhile.

        Returns all files added so far, sorted by path. Raises ArtifactError as `file_entries` does.
        """
        new = {
            name: path
            for name, path in list_files(directory).items()
            if name not in UNLISTED and name not in self._entries
        }
        if self._standing is None:
            self._send(new)
        with ThreadPoolExecutor(NUM_HASHERS) as hashers:
            self._entries |= zip(new, hashers.map(file_entry, new.values(), new), strict=True)
        return tuple(entry for _, entry in sorted(self._entries.items()))

    def commit(self, directory: Path, *, kind: Kind, move_latest: bool) -> Commit:
        """Publish the directory, manifest last, and return the run's final commit.

        If another attempt was first, the commit is that attempt's and this attempt is deleted. Raises
        ArtifactError if the directory does not match its manifest, StoreError if the store fails.
        """
        manifest, manifest_sha256 = self._check(directory, kind=kind)
        commit = self._standing
        if commit is None:
            commit = Commit(
                run_key=self._run_key,
                attempt=self._attempt,
                manifest_sha256=manifest_sha256,
                kind=kind,
                committed_at=_next_time(self._store).isoformat(timespec="microseconds"),
            )
            for sent in self._sent.values():
                sent.result()
            last = {name: path for name, path in list_files(directory).items() if name in UNLISTED}
            for name in sorted(last, key=lambda name: name == MANIFEST_NAME):
                self._send({name: last[name]})
                self._sent[name].result()
            self._is_open = False  # from here on a commit may name these files, so they stay
            self._standing = commit = _commit(self._store, commit)
        self._announce(commit, manifest, move_latest=move_latest)
        return commit

    def _announce(self, commit: Commit, manifest: Manifest, *, move_latest: bool) -> None:
        """Write the index and the hint. A failure is only a warning, since readers correct both."""
        written: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(2) as pool:
            if commit.attempt == self._attempt:
                written[INDEX_NAME] = pool.submit(add_to_index, self._store, commit, manifest)
            if move_latest and commit.kind == "model":
                written[LATEST_NAME] = pool.submit(move_hint, self._store, commit)
        for name, future in written.items():
            if (error := future.exception()) is not None:
                what = f"{error}" if isinstance(error, FFSplitError) else f"{type(error).__name__}: {error}"
                text = f"warning: {self._store.uri}/{name} is out of date until its next reader: {what}"
                logs.log(text, level=logging.WARNING)

    def _send(self, files: dict[str, Path]) -> None:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        self._total += sum(sizes.values())
        for name in sorted(files, key=lambda name: -sizes[name]):
            self._sent[name] = self._pool.submit(self._put, name, files[name], sizes[name])

    def _put(self, name: str, path: Path, size_bytes: int) -> None:
        self._store.put_file(f"{self._run_key}/{self._attempt}/{name}", path)
        with self._lock:
            self._done += size_bytes
            if self._progress:
                self._progress(self._done, self._total)

    def _check(self, directory: Path, *, kind: Kind) -> tuple[Manifest, str]:
        """The manifest of the directory, and its sha256. Adds every file that was not added before."""
        try:
            data = (directory / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"{directory} has no {MANIFEST_NAME}") from None
        except OSError as error:
            raise ArtifactError(f"cannot read {error.filename}: {error.strerror}") from error
        manifest = Manifest.from_json(data)
        if (manifest.run_key, manifest.attempt, manifest.kind) != (self._run_key, self._attempt, kind):
            found = f"the {manifest.kind} of {manifest.run_key}/{manifest.attempt}"
            raise ArtifactError(
                f"{directory} holds {found}, not the {kind} of {self._run_key}/{self._attempt}"
            )
        if differing := set(manifest.files) ^ set(self.add(directory)):
            names = ", ".join(sorted({entry.path for entry in differing}))
            raise ArtifactError(f"{directory} does not match its manifest: {names}")
        return manifest, hashlib.sha256(data).hexdigest()


def _next_time(store: Store) -> datetime:
    """The present, but later than the newest model: `latest` follows these times, and clocks may go back."""
    now = datetime.now(timezone.utc)
    with suppress(FFSplitError):  # the hint may be missing or of a newer version
        if (hint := read_hint(store)) is not None:
            now = max(now, hint.order[0] + timedelta(microseconds=1))
    return now


def _commit(store: Store, commit: Commit) -> Commit:
    """Create commit.json if absent, then read it back: its content decides which attempt won.

    Not every S3 server makes If-None-Match atomic. If one accepts two writers, reading back makes the
    last commit written the winner for both.
    """
    key = f"{commit.run_key}/{COMMIT_NAME}"
    try:
        store.put_if_absent(key, record_bytes(commit))
        winner = read_commit(store, commit.run_key)
        if winner is None:
            raise StoreError(f"{store.uri}/{key} was written but is missing: publish again")
    except BaseException:
        with suppress(FFSplitError):  # if the outcome is unknown, files stay: a commit may name them
            standing = read_commit(store, commit.run_key)
            if standing is None or standing.attempt != commit.attempt:
                _delete_attempt(store, run_key=commit.run_key, attempt=commit.attempt)
        raise
    if winner.attempt != commit.attempt:
        _delete_attempt(store, run_key=commit.run_key, attempt=commit.attempt)
    return winner


def _delete_attempt(store: Store, *, run_key: str, attempt: str) -> None:
    """Delete an attempt that did not win. If that fails, warn: the orphan is invisible to readers."""
    try:
        store.delete_prefix(f"{run_key}/{attempt}")
    except FFSplitError as error:
        text = f"warning: {store.uri}/{run_key}/{attempt} stays until ffsplit gc removes it: {error}"
        logs.log(text, level=logging.WARNING)
