"""Copy listed files from a store to a directory: in parallel, by ranges, resuming a broken copy.

Each file is fetched in parts, several at a time. The thread that finishes a part hashes all parts that are
complete in order, so the digest is known soon after the last byte. A journal lists the finished parts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from ffsplit.errors import ArtifactError, ConfigError, RunError, StoreError, begun
from ffsplit.store.entries import FileEntry, hash_range
from ffsplit.store.store import MissingKey, Source

PART_BYTES = 8 << 20
NUM_CONNECTIONS = 8
JOURNAL_NAME = "journal"
FILES_NAME = "artifact"
FREE_BYTES = 64 << 20
"""Disk space that a download leaves free."""

Progress = Callable[[int, int], None]
"""Called with bytes done and total bytes."""


@dataclass
class _Incoming:
    """One file in transfer: its finished parts, and the digest of the leading ones without a gap."""

    number: int
    key: str
    entry: FileEntry
    path: Path
    parts: set[int] = field(default_factory=set)
    resumed: bool = False
    num_hashed: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    hashing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_parts(self) -> int:
        return -(-self.entry.size_bytes // PART_BYTES)

    def size_of(self, part: int) -> int:
        return min(PART_BYTES, self.entry.size_bytes - part * PART_BYTES)

    def hash_arrived(self) -> None:
        """Hash the parts that follow the last hashed one, unless another thread is doing so."""
        while self.num_hashed in self.parts and self.hashing.acquire(blocking=False):
            try:
                with self.path.open("rb", buffering=0) as file:  # a buffer would read into missing parts
                    while (part := self.num_hashed) in self.parts:
                        size_bytes = self.size_of(part)
                        hash_range(file, self.digest, start=part * PART_BYTES, size_bytes=size_bytes)
                        self.num_hashed += 1
            finally:
                self.hashing.release()

    def start_over(self) -> None:
        self.parts.clear()
        self.resumed, self.num_hashed, self.digest = False, 0, hashlib.sha256()

    @property
    def is_right(self) -> bool:
        return self.num_hashed == self.num_parts and self.digest.hexdigest() == self.entry.sha256


class Transfer:
    """The copy of one artifact's files into `staging/artifact`, where an earlier copy may have left parts.

    A file's key is `prefix` plus its path. A transfer raises ConfigError, before the first byte, if there
    is not enough disk space; ArtifactError, naming the file, if one is missing or does not match its entry;
    StoreError if the source fails: a later transfer into the same staging directory then resumes.
    """

    def __init__(
        self, source: Source, *, prefix: str, entries: Sequence[FileEntry], staging: Path, label: str
    ) -> None:
        self._source, self._staging, self._label = source, staging, label
        whole = staging / FILES_NAME
        self._files = [
            _Incoming(number, prefix + entry.path, entry, whole / entry.path)
            for number, entry in enumerate(entries)
        ]
        self._total = sum(entry.size_bytes for entry in entries)
        self._done = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def into(
        self, target: Path, *, beside: Mapping[str, bytes] | None = None, progress: Progress | None = None
    ) -> None:
        """Fetch the files, add the small ones in `beside`, and rename the directory to `target`."""
        self._staging.mkdir(parents=True, exist_ok=True)
        self._check_space()
        try:
            with begun():
                whole = self.run(progress=progress)
                for name, data in (beside or {}).items():
                    (whole / name).write_bytes(data)
                whole.rename(target)
        except ArtifactError:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error
        shutil.rmtree(self._staging, ignore_errors=True)

    def run(self, *, progress: Progress | None = None) -> Path:
        """Fetch what is missing and check every digest. Returns the directory with the files."""
        self._read_journal()
        for file in self._files:
            _make_room(file)
        self._fetch(self._files, progress)
        again = [file for file in self._files if not file.is_right and file.resumed]
        for file in again:  # a part that an earlier attempt left may be damaged
            file.start_over()
        self._fetch(again, progress)
        for file in self._files:
            if not file.is_right:
                raise ArtifactError(f"{self._label}: {file.entry.path} does not match its sha256")
        return self._staging / FILES_NAME

    def _fetch(self, files: Sequence[_Incoming], progress: Progress | None) -> None:
        """Fetch the missing parts of some files, in order, several at a time."""
        missing = [(file, part) for file in files for part in range(file.num_parts) if part not in file.parts]
        for file in files:
            file.hash_arrived()
        with (
            open(self._staging / JOURNAL_NAME, "a", encoding="utf-8") as journal,
            ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="ffsplit-transfer") as pool,
        ):
            errors: list[Exception] = []

            def fetch(file: _Incoming, part: int) -> None:
                try:
                    if self._stop.is_set() or not self._fetch_part(file, part):
                        return
                except Exception as error:
                    errors.append(error)  # in the order of their times: the first is the cause
                    raise
                with self._lock:
                    journal.write(f"{file.number} {part}\n")
                    journal.flush()
                    file.parts.add(part)
                    self._done += file.size_of(part)
                    if progress:
                        progress(self._done, self._total)
                file.hash_arrived()

            try:
                tasks = [pool.submit(fetch, file, part) for file, part in missing]
                wait(tasks, return_when=FIRST_EXCEPTION)
                if errors:
                    raise errors[0]
                for task in tasks:
                    if task.done():
                        task.result()
            finally:
                self._stop.set()
        self._stop.clear()

    def _fetch_part(self, file: _Incoming, part: int) -> bool:
        """Write one part at its offset; False if stopped. Raises ArtifactError if bytes are missing."""
        start, size_bytes = part * PART_BYTES, file.size_of(part)
        offset = start
        descriptor = os.open(file.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for chunk in self._source.open_stream(file.key, start=start, size_bytes=size_bytes):
                if self._stop.is_set():
                    return False
                if offset + len(chunk) > start + size_bytes:
                    raise StoreError(f"{self._label}: {file.entry.path}: got more bytes than requested")
                written = 0
                while written < len(chunk):
                    written += os.pwrite(descriptor, memoryview(chunk)[written:], offset + written)
                offset += len(chunk)
        except MissingKey:
            raise ArtifactError(f"{self._label}: {file.entry.path} is missing") from None
        finally:
            os.close(descriptor)
        if offset != start + size_bytes:
            size = f"{file.entry.size_bytes:,} bytes"
            raise ArtifactError(f"{self._label}: {file.entry.path} is shorter than its {size}")
        return True

    def _check_space(self) -> None:
        """Raise ConfigError if the disk has too little space."""
        arrived = sum(path.lstat().st_blocks * 512 for path in self._staging.rglob("*") if path.is_file())
        free = shutil.disk_usage(self._staging).free - FREE_BYTES
        if (needed := self._total - arrived) > free:
            shutil.rmtree(self._staging, ignore_errors=True)
            what = f"the files need {needed:,} more bytes and {max(free, 0):,} are free"
            raise ConfigError(f"{self._staging.parent}: {what}: choose another directory")

    def _read_journal(self) -> None:
        """Read which parts an earlier attempt finished, for files that still exist at full size."""
        try:
            lines = (self._staging / JOURNAL_NAME).read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return
        arrived = set(lines)
        for file in self._files:
            if file.path.is_symlink() or not file.path.is_file():
                continue
            if file.path.stat().st_size == file.entry.size_bytes:
                parts = range(file.num_parts)
                file.parts = {part for part in parts if f"{file.number} {part}" in arrived}
                file.resumed = bool(file.parts)
                self._done += sum(map(file.size_of, file.parts))


def _make_room(file: _Incoming) -> None:
    """Create the file at its full size, so that parts can be written in any order."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    if not file.resumed:
        file.path.unlink(missing_ok=True)
        with file.path.open("xb") as new:
            new.truncate(file.entry.size_bytes)


def first_problem(directory: Path, entries: Iterable[FileEntry]) -> str | None:
    """The first listed file that is missing, a link, or of the wrong size in a directory, in words."""
    for entry in entries:
        path = directory / entry.path
        if path.is_symlink() or not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size_bytes:
            return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size_bytes}"
    return None
