"""Inputs of a run that lie in a store: a model's directory or a text file.

The files are described by their digests. The description is small, so a driver can send it to workers
on other nodes. Each node fetches the same files into its own cache on first use:

    inputs = stored_files("s3://bucket/model", choose=lambda names: names)            # the driver
    directory = inputs.materialize()                                                  # any worker

In the cache a description is named by the store's listing (keys, sizes, modification times), so a file
that was replaced is fetched and described again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from ffsplit.config import Record
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.store.cache import Cache
from ffsplit.store.digests import sha256_file
from ffsplit.store.entries import FileEntry, is_safe_path
from ffsplit.store.local import LocalStore
from ffsplit.store.store import Store, Stored, open_store
from ffsplit.store.transfer import Transfer, first_problem

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
    stamps = [f"{each.key}\0{each.size_bytes}\0{each.modified_at.isoformat()}" for each in entries]
    digest = hashlib.sha256("\n".join([store.uri, *stamps]).encode()).hexdigest()

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
