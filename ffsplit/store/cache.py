"""The local cache of artifacts, shared by the processes of a machine and limited in size.

<root>/artifacts/<digest>/      a complete artifact, verified before its directory appeared
<root>/artifacts/.<digest>/     a download in progress, or an interrupted one, which the next download resumes
<root>/locks/<digest>           exists while a process downloads or removes that artifact
<root>/readers/<digest>         locked by every process that uses that artifact, until the process ends

The root is $FFSPLIT_CACHE, else ~/.cache/ffsplit; the size limit is $FFSPLIT_CACHE_LIMIT, 50GB by default.
The least recently used artifacts are removed first. An artifact that a process reads, or that was used in
the last ten minutes, is never removed, whatever the limit. An artifact larger than the limit is downloaded
and read like any other, and removed once nobody reads it.

A run's inputs in a store (a model or a text file) are cached in the same way. They are described by their
digests. The description is small, so a driver can send it to workers on other nodes. Each node
fetches the same files into its own cache on first use:

    inputs = stored_files("s3://bucket/model", choose=lambda names: names)            # the driver
    directory = inputs.materialize()                                                  # any worker

In the cache a description is named by the store's listing (keys, sizes, modification times), so a file that
was replaced is fetched and described again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ffsplit.config import Record, parse_size
from ffsplit.directories import home_directory, user_path
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.store.entries import FileEntry, is_safe_path, sha256_file
from ffsplit.store.local import LocalStore
from ffsplit.store.locks import locked, share, try_locked
from ffsplit.store.store import Store, Stored, open_store
from ffsplit.store.transfer import Transfer, first_problem

DEFAULT_LIMIT = "50GB"
GRACE_S = 600.0


@dataclass(frozen=True)
class Cache:
    """Directories, named by the digest of their contents."""

    root: Path
    limit_bytes: int

    @classmethod
    def open(cls, root: Path | None = None) -> Cache:
        """The cache of this user, or the one in `root`. Raises ConfigError if the limit is not a size."""
        given, home = os.environ.get("FFSPLIT_CACHE"), home_directory()
        if root is None and not given and home is None:
            chosen = Path("no-home")  # empty, and never created: most commands need no cache
        else:
            chosen = (root or user_path(given or "~/.cache/ffsplit")).absolute()
        limit = os.environ.get("FFSPLIT_CACHE_LIMIT") or DEFAULT_LIMIT
        return cls(chosen, parse_size(limit, name="FFSPLIT_CACHE_LIMIT"))

    def find(self, digest: str, *, is_whole: Callable[[Path], bool]) -> Path | None:
        """The directory of a digest, None when it is missing or incomplete. Counts as a use of it.

        The directory is kept until this process ends.
        """
        directory = self.root / "artifacts" / digest
        if not is_whole(directory):
            return None
        try:
            _read(self._readers(digest))
        except OSError:  # a user who cannot write to the cache cannot shrink it either
            return directory
        if not is_whole(directory):  # it was removed just before
            return None
        with suppress(OSError):
            os.utime(directory)
        return directory

    def get(
        self, digest: str, *, is_whole: Callable[[Path], bool], bring: Callable[[Path, Path], None]
    ) -> Path:
        """The directory of a digest, downloaded by `bring(target, staging)` if it is missing.

        If several processes want the same one, one downloads it and the others wait.
        """
        if found := self.find(digest, is_whole=is_whole):
            return found
        if not self.root.is_absolute():
            raise ConfigError("this user has no home directory for the cache: set FFSPLIT_CACHE, or HOME")
        target = self.root / "artifacts" / digest
        try:
            _read(self._readers(digest))
            with locked(self._lock(digest)):
                if found := self.find(digest, is_whole=is_whole):
                    return found
                shutil.rmtree(target, ignore_errors=True)
                bring(target, target.with_name(f".{digest}"))
        except OSError as error:
            why = f"cannot write the cache in {self.root}: {error.strerror or error}"
            raise ConfigError(f"{why}: set FFSPLIT_CACHE to another directory") from error
        self.shrink()
        return target

    def shrink(self) -> None:
        """Remove the least recently used artifacts that nobody reads until the rest is within the limit."""
        entries = []
        with suppress(OSError):
            for path in (self.root / "artifacts").iterdir():
                with suppress(OSError):
                    entries.append((path.stat().st_mtime, _size_bytes(path), path))
        total = sum(size_bytes for _, size_bytes, _ in entries)
        for used_at, size_bytes, path in sorted(entries):
            if total <= self.limit_bytes or abs(time.time() - used_at) < GRACE_S:  # the clock may go back
                return
            digest = path.name.removeprefix(".")
            with try_locked(self._lock(digest)) as held, try_locked(self._readers(digest)) as unread:
                if held and unread:
                    shutil.rmtree(path, ignore_errors=True)
                    total -= size_bytes

    def _lock(self, digest: str) -> Path:
        return self.root / "locks" / digest

    def _readers(self, digest: str) -> Path:
        return self.root / "readers" / digest


_reading: dict[tuple[int, Path], int] = {}
"""The descriptors that hold this process's reader locks; a forked child takes its own."""
_guard = threading.Lock()


def _read(path: Path) -> None:
    """Lock an artifact as a reader, once per process, until the process ends. Raises OSError."""
    with _guard:
        held = _reading.get((os.getpid(), path))
        if held is not None and _is_at(held, path):
            return
        _reading[os.getpid(), path] = share(path)
        if held is not None:
            os.close(held)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the descriptor's file: somebody may have cleared the cache."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _size_bytes(directory: Path) -> int:
    """Bytes used on disk: a file that is still being downloaded is sparse."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


NUM_FILES_AT_ONCE = 4
_RECORD_NAME = "files.json"


class StoredFiles(Record):
    """Files in a store with their sizes and digests; paths are relative to `uri`."""

    uri: str
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """sha256 of all paths and contents; it does not depend on where they are stored."""
        lines = [f"{entry.path}\0{entry.size_bytes}\0{entry.sha256}" for entry in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def materialize(self) -> Path:
        """A local directory with these files: in place, or verified in the cache.

        If several processes want them, one fetches them and the others wait. Raises ArtifactError if a
        file is missing or has changed, StoreError if the store fails, ConfigError if the cache cannot
        be written.
        """
        store = open_store(self.uri)
        if isinstance(store, LocalStore):
            directory = Path(store.uri)
            if problem := first_problem(directory, self.files):
                raise ArtifactError(f"{directory}: {problem}: it was changed during the run")
            return directory
        return self._cached(store, Cache.open())

    def _cached(self, store: Store, cache: Cache) -> Path:
        def bring(target: Path, staging: Path) -> None:
            Transfer(store, prefix="", entries=self.files, staging=staging, label=self.uri).into(target)

        return cache.get(self.digest, is_whole=self.are_in, bring=bring)

    def are_in(self, directory: Path) -> bool:
        """Whether a directory has these files with these sizes; digests are not checked."""
        return first_problem(directory, self.files) is None


def is_remote(uri: str) -> bool:
    """Whether an input is in a store and must be fetched."""
    return uri.lower().startswith("s3://")


def stored_files(uri: str, *, choose: Callable[[tuple[str, ...]], Collection[str]]) -> StoredFiles:
    """The files below a directory that `choose` selects. They are in the cache from now on."""
    store = open_store(uri)
    entries = [entry for entry in store.list_details("") if not entry.key.endswith("/")]  # a folder's marker
    chosen = choose(tuple(entry.key for entry in entries))
    return _described(store, [entry for entry in entries if entry.key in chosen])


def fetch_file(uri: str) -> Path:
    """A local copy of one file. Raises ConfigError when it does not exist."""
    folder, _, name = uri.rpartition("/")
    if not is_safe_path(name) or folder.count("/") < 2:
        raise ConfigError(f"{uri} names no file: write s3://bucket/prefix/file")
    store = open_store(folder)
    entries = [entry for entry in store.list_details("") if entry.key == name]
    if not entries:
        raise ConfigError(f"{uri}: the file does not exist; check the path")
    return _described(store, entries).materialize() / name


def _described(store: Store, entries: Sequence[Stored]) -> StoredFiles:
    """The files of a listing with their digests; fetched unless the same listing was described before."""
    cache = Cache.open()
    stamps = [(each.key, str(each.size_bytes), each.modified_at.isoformat(), each.etag) for each in entries]
    digest = hashlib.sha256("\n".join([store.uri, *map("\0".join, stamps)]).encode()).hexdigest()

    def is_whole(directory: Path) -> bool:
        found = _read_record(directory)
        return found is not None and cache.find(found.digest, is_whole=found.are_in) is not None

    def bring(target: Path, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)

        def fetch(entry: Stored) -> FileEntry:
            path = store.fetch(entry.key, staging / "fetched")
            return FileEntry(path=entry.key, size_bytes=path.stat().st_size, sha256=sha256_file(path))

        with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
            found = StoredFiles(uri=store.uri, files=tuple(pool.map(fetch, entries)))

        def keep(target: Path, _: Path) -> None:
            (staging / "fetched").rename(target)

        cache.get(found.digest, is_whole=found.are_in, bring=keep)
        shutil.rmtree(staging / "fetched", ignore_errors=True)
        (staging / _RECORD_NAME).write_text(found.model_dump_json())
        staging.rename(target)

    record = _read_record(cache.get(digest, is_whole=is_whole, bring=bring))
    assert record is not None
    return record


def _read_record(directory: Path) -> StoredFiles | None:
    """The description in a directory of the cache, None if it is missing or invalid."""
    try:
        return StoredFiles.model_validate_json((directory / _RECORD_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
