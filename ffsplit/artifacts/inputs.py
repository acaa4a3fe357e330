"""What a run starts from when it lies in a store: a model's directory or a file of text, kept in the cache.

What is fetched is named by the keys, sizes and times of writing that the store lists, so a file that
was replaced is fetched again. What it holds is digested by whoever uses it, as with local files.
"""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ffsplit.artifacts.cache import Cache
from ffsplit.artifacts.stores import Store, Stored, open_store
from ffsplit.errors import ConfigError

NUM_FILES_AT_ONCE = 4


def is_remote(uri: str) -> bool:
    """Whether an input is in a store and has to be fetched."""
    return uri.lower().startswith("s3://")


def fetch_directory(uri: str, *, suffixes: tuple[str, ...]) -> Path:
    """A local copy of the wanted files right in a directory. Raises ConfigError when there are none."""
    store = open_store(uri)
    entries = [
        entry for entry in store.list_details("") if "/" not in entry.key and entry.key.endswith(suffixes)
    ]
    if not entries:
        raise ConfigError(f"model directory {uri} does not exist, or holds no model")
    return _fetched(store, entries)


def fetch_file(uri: str) -> Path:
    """A local copy of one file. Raises ConfigError when it does not exist."""
    folder, _, name = uri.rpartition("/")
    if not name or folder.count("/") < 2:
        raise ConfigError(f"{uri} names no file: write s3://bucket/prefix/file")
    store = open_store(folder)
    entries = [entry for entry in store.list_details("") if entry.key == name]
    if not entries:
        raise ConfigError(f"{uri}: the file does not exist; check the path")
    return _fetched(store, entries) / name


def _fetched(store: Store, entries: list[Stored]) -> Path:
    stamps = [f"{each.key}\0{each.size_bytes}\0{each.modified_at.isoformat()}" for each in entries]
    digest = hashlib.sha256("\n".join([store.uri, *stamps]).encode()).hexdigest()

    def bring(target: Path, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
            for path in pool.map(lambda entry: store.fetch(entry.key, staging), entries):
                assert path.is_relative_to(staging)
        staging.rename(target)

    def is_whole(directory: Path) -> bool:
        paths = [(directory / entry.key, entry.size_bytes) for entry in entries]
        return all(path.is_file() and path.stat().st_size == size_bytes for path, size_bytes in paths)

    return Cache.open().get(digest, is_whole=is_whole, bring=bring)
