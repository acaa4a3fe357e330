"""Resume state: results of an uncommitted run, so that a crash costs at most the work in progress.

The scratch of a run is `<out>/.scratch/<work key>/`. Each finished piece of work is one record,
`<stage>/<name>.json`, written after its files, with their digests and its own. If the record is missing or a
file does not match its digest, the work is done again. A store that cannot be read is an error. The class
`Lease` decides who may remove a scratch, and when.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pydantic import JsonValue

from ffsplit import logs
from ffsplit.config import Record
from ffsplit.directories import full_disk_explained, process_folder
from ffsplit.errors import ArtifactError, ConfigError, FFSplitError, StoreError
from ffsplit.store.entries import FileEntry, sha256_file
from ffsplit.store.schema import read_record
from ffsplit.store.store import MissingKey, Store, Stored, open_store

SCRATCH_PREFIX = ".scratch"
Computed = TypeVar("Computed", bound="Result | None")


class Result(Record):
    """A finished piece of work. File paths are store keys; facts are small JSON values."""

    name: str
    files: tuple[FileEntry, ...]
    facts: dict[str, JsonValue]
    reused: bool = False


class Scratch(Record):
    """Where the results of a run or one stage go. Small and picklable: workers open the store themselves."""

    uri: str
    prefix: str
    witness: str | None = None
    """A key that every host must find if it sees the same store; None if there is one host."""

    @classmethod
    def of(cls, uri: str, key: str) -> Scratch:
        """The scratch of the run that computes what `key` names, in the store at `uri`."""
        return cls(uri=uri, prefix=f"{SCRATCH_PREFIX}/{key}")

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def witnessed_by(self, key: str) -> Scratch:
        """This scratch, for use on several hosts, each of which must find `key` in its store."""
        return self.model_copy(update={"witness": key})

    def part(self, name: str) -> Scratch:
        """The part of this scratch that belongs to a stage."""
        return self.model_copy(update={"prefix": self.key(name)})

    def save(self, name: str, files: Mapping[str, Path], *, facts: Mapping[str, JsonValue]) -> Result:
        """Store files (by name), then the record that makes them valid."""
        store = _store(self.uri)
        entries = []
        for file_name, path in files.items():
            key = self.key(file_name)
            store.put_file(key, path)
            entries.append(FileEntry(path=key, size_bytes=path.stat().st_size, sha256=sha256_file(path)))
        return self.record(name, entries, facts=facts)

    def put_each(
        self, files: Iterable[tuple[str, Callable[[], bytes]]], *, num_threads: int
    ) -> list[FileEntry]:
        """Store files that are made in memory, and return them in order; a record must follow.

        Each is made and stored in one of `num_threads` threads, and no more files than that wait.
        """
        store = _store(self.uri)

        def put(file_name: str, make: Callable[[], bytes]) -> FileEntry:
            key, data = self.key(file_name), make()
            store.put_bytes(key, data)
            return FileEntry(path=key, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

        entries: list[Future[FileEntry]] = []
        with ThreadPoolExecutor(num_threads) as threads:
            for file_name, make in files:
                entries.append(threads.submit(put, file_name, make))
                if len(entries) > 2 * num_threads:
                    entries[-2 * num_threads].result()
        return [each.result() for each in entries]

    def record(self, name: str, files: Iterable[FileEntry], *, facts: Mapping[str, JsonValue]) -> Result:
        """Write the record that makes stored files valid."""
        result = Result(name=name, files=tuple(files), facts=dict(facts))
        record = result.model_dump_json().encode()
        _store(self.uri).put_bytes(self.key(f"{name}.json"), record + b"\n" + _sha256(record))
        return result

    def load(self, name: str) -> Result | None:
        """An earlier result, or None if it is missing or its files do not match the record.

        Raises StoreError if the store cannot be read.
        """
        try:
            record, _, digest = _store(self.uri).get_bytes(self.key(f"{name}.json")).partition(b"\n")
            if digest != _sha256(record):
                return None
            result = read_record(Result, record, name=self.key(f"{name}.json"))
            if not all(self._matches(entry) for entry in result.files):
                return None
        except (MissingKey, ArtifactError):
            return None
        return result.model_copy(update={"reused": True})

    def save_next(self, series: str, number: int, path: Path) -> Result:
        """Store a file as the `number`-th of a series, then remove the earlier ones.

        Each has its own name and record, so the newest record's file is complete at any moment.
        """
        saved = self.save_numbered(series, number, path)
        self.drop_older(series, number)
        return saved

    def save_numbered(self, series: str, number: int, path: Path) -> Result:
        """Store a file as the `number`-th of a series, beside the earlier ones."""
        name = f"{series}-{number:08d}"
        return self.save(name, {f"{name}{path.suffix}": path}, facts={"number": number})

    def drop_older(self, series: str, number: int) -> None:
        """Remove what a series has before its `number`-th."""
        store, older = _store(self.uri), []
        for key in store.list(self.prefix):
            found = _numbered(key.removeprefix(f"{self.prefix}/"), series)
            if found is not None and found < number:
                older.append(key)
        for key in sorted(older, key=lambda key: not key.endswith(".json")):  # no record without its file
            store.delete(key)

    def load_numbered(self, series: str, number: int) -> Result | None:
        """The `number`-th of a series, None if it is missing or not complete."""
        return self.load(f"{series}-{number:08d}")

    def numbers(self, series: str) -> list[int]:
        """The numbers in a series that have a record, in order."""
        return sorted(int(name.removeprefix(f"{series}-")) for name in self._names(series))

    def load_newest(self, series: str) -> Result | None:
        """The newest complete result of a series, None if there is none. Raises StoreError as `load` does."""
        before: set[str] = set()
        while (names := self._names(series)) != before:  # a newer one may replace the one being read
            for name in sorted(names, reverse=True):
                if (found := self.load(name)) is not None:
                    return found
            before = names
        return None

    def _names(self, series: str) -> set[str]:
        """The results of a series that have a record."""
        files = [key.removeprefix(f"{self.prefix}/") for key in _store(self.uri).list(self.prefix)]
        return {
            file.removesuffix(".json")
            for file in files
            if file.endswith(".json") and _numbered(file, series) is not None
        }

    def load_or_compute(self, name: str, compute: Callable[[], Computed]) -> Result | Computed:
        """An earlier result, or a new one; None if another process saves the new one.

        Both cases are logged, with run and stage.
        """
        with logs.fields(stage=self.prefix.split("/", 2)[-1], item=name):
            self._check_visible()
            found = self.load(name)
            if found is not None:
                logs.log("reused")
                return found
            logs.log("started")
            started = time.monotonic()
            with full_disk_explained():
                result = compute()
            if result is not None:
                _log_finished(result, seconds=time.monotonic() - started)
            return result

    def path(self, entry: FileEntry) -> Path:
        """A local file with a result's bytes."""
        return _store(self.uri).fetch(entry.path, process_folder())

    @contextmanager
    def reading(self, entry: FileEntry) -> Iterator[Path]:
        """A local file with a result's bytes; a downloaded copy is removed at the end of the block."""
        path = self.path(entry)
        try:
            yield path
        finally:
            if path.is_relative_to(process_folder()):
                path.unlink(missing_ok=True)

    def _check_visible(self) -> None:
        if self.witness is not None and not _store(self.uri).exists(self.witness):
            raise ConfigError(
                f"--out {self.uri}: host {socket.gethostname()} has joined and cannot see it: "
                "give s3://bucket/prefix or a directory that all hosts share"
            )

    def _matches(self, entry: FileEntry) -> bool:
        with self.reading(entry) as path:
            try:
                return path.stat().st_size == entry.size_bytes and sha256_file(path) == entry.sha256
            except FileNotFoundError:  # another run of the same key cleaned up meanwhile
                return False
            except OSError as error:
                raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _log_finished(result: Result, *, seconds: float) -> None:
    logs.log(
        "finished",
        seconds=round(seconds, 3),
        size_bytes=sum(entry.size_bytes for entry in result.files),
        num_tokens=int(str(result.facts.get("num_tokens", 0))),
    )


def _numbered(file_name: str, series: str) -> int | None:
    """The number of a file in a series, None for any other file."""
    match = re.fullmatch(rf"{re.escape(series)}-(\d+)\.\w+", file_name)
    return int(match[1]) if match else None


def _sha256(record: bytes) -> bytes:
    return hashlib.sha256(record).hexdigest().encode()


@cache
def _store(uri: str) -> Store:
    return open_store(uri)


# Leases: which runs use a scratch, so that none removes what another still needs.
#
# <out>/.scratch/<work key>/owners/<run key>-<id>.json   an active run; rewritten every minute
# <out>/.scratch/<work key>/owners/closing-<id>.json     a run that is removing this scratch
#
# Runs that differ only in their gates share a scratch. A committed run removes it unless another run key
# holds it. If a run ends in any other way, its scratch stays for the next run, and `ffsplit gc` finally
# collects it. An owner record older than LEASE is void: its run was killed, or lost its store. Times are the
# store's own, so the clocks of hosts do not matter. If the store's clock goes back, a record from the future
# is void too, or it would be held until the clock is there again.
#
# A run that removes a scratch first announces it, then looks for owners; a run that starts first registers,
# then looks for announcements. So of two concurrent runs at least one sees the other, and gives way.

OWNERS, CLOSING = "owners", "closing-"
LEASE = timedelta(minutes=10)
RENEW_EVERY_S = 60.0
LOOK_EVERY_S = 1.0


class Lease:
    """A run's hold on its scratch, for the duration of the `with` block. Problems are reported to `note`."""

    def __init__(
        self, store: Store, scratch: Scratch, *, run_key: str, note: Callable[[str], object]
    ) -> None:
        self._store, self._prefix, self._note, self._run_key = store, scratch.prefix, note, run_key
        name = secrets.token_hex(6)
        self._key = f"{self._prefix}/{OWNERS}/{run_key}-{name}.json"
        self._closing = f"{self._prefix}/{OWNERS}/{CLOSING}{name}.json"
        self._where = f"{store.uri}/{self._prefix}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ffsplit-lease", daemon=True)

    def __enter__(self) -> Lease:
        try:
            self._begin()
        except BaseException:
            with suppress(FFSplitError):  # the original error matters more
                self._store.delete(self._key)
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_renewing()
        try:
            self._store.delete(self._key)
        except FFSplitError as failure:
            minutes = int(LEASE.total_seconds() / 60)
            self._note(f"warning: {self._where} counts as in use for {minutes} minutes: {failure}")

    def remove_scratch(self) -> None:
        """Remove the scratch of a committed run, unless another run holds it."""
        self._stop_renewing()
        try:
            self._write(self._closing)
            self._store.delete(self._key)  # of two runs that end at once, the later one sees no other owner
            others = holders(self._owners(), now=self._time_of(self._closing)) - {self._run_key, ""}
            if others:
                self._note(f"{self._where} stays: run {min(others)} uses it")
            else:
                self._remove_all()
            self._store.delete(self._closing)
        except FFSplitError as error:  # the artifact is committed anyway
            self._note(f"warning: {self._where} was not removed: {error}: ffsplit gc will remove it")

    def _begin(self) -> None:
        """Register, then wait until no other run is removing this scratch."""
        told = False
        while True:
            self._write(self._key)
            now = self._time_of(self._key)
            owners = self._owners()
            closing = [each for each in owners if _name(each).startswith(CLOSING)]
            for each in closing:
                if not _is_held(each, now=now):  # it was killed while removing
                    self._store.delete(each.key)
            is_closing = any(_is_held(each, now=now) for each in closing)
            if not is_closing and any(each.key == self._key for each in owners):
                return  # else the removal that has just ended took this record with it
            if is_closing and not told:
                self._note(f"{self._where}: another run is removing this scratch: waiting for it to end")
                told = True
            time.sleep(LOOK_EVERY_S)

    def _remove_all(self) -> None:
        """Remove everything except the announcement, which keeps other runs from starting here."""
        for name in self._store.list_directories(self._prefix):
            if name != OWNERS:
                self._store.delete_prefix(f"{self._prefix}/{name}")
        for key in list(self._store.list(self._prefix)):
            if not key.rpartition("/")[2].startswith(CLOSING):
                self._store.delete(key)

    def _keep(self) -> None:
        """Rewrite the owner's record periodically, even after a failure: the store may recover."""
        is_failing = False
        while not self._over.wait(RENEW_EVERY_S):
            try:
                self._write(self._key)
                is_failing = False
            except Exception as error:
                if not is_failing:
                    self._note(f"warning: {self._where}: cannot renew this run's hold on it: {error}")
                is_failing = True

    def _stop_renewing(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _write(self, key: str) -> None:
        """Write a record. Its content is for people: only its key and modification time are used."""
        record = {"run_key": self._run_key, "host": socket.gethostname(), "pid": os.getpid()}
        self._store.put_bytes(key, (json.dumps(record) + "\n").encode())

    def _owners(self) -> list[Stored]:
        return list(self._store.list_details(f"{self._prefix}/{OWNERS}"))

    def _time_of(self, key: str) -> datetime:
        """When the store wrote this run's own record: the present by the store's clock."""
        found = {each.key: each.modified_at for each in self._owners()}
        return found.get(key) or datetime.now(timezone.utc)  # a listing may lag behind


def holders(entries: Iterable[Stored], *, now: datetime) -> set[str]:
    """The run keys that hold a scratch, from its files; "" stands for a run that is removing it."""
    return {
        "" if _name(each).startswith(CLOSING) else _name(each).partition("-")[0]
        for each in entries
        if each.key.split("/")[2:3] == [OWNERS] and _is_held(each, now=now)
    }


def _is_held(entry: Stored, *, now: datetime) -> bool:
    """Whether an owner's record is renewed. One from the future is not: the store's clock went back since."""
    return abs(now - entry.modified_at) <= LEASE


def _name(entry: Stored) -> str:
    return entry.key.rpartition("/")[2]
