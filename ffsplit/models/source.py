"""A checkpoint's directory, as whichever host works on it finds it."""

from __future__ import annotations

import socket
from pathlib import Path

from ffsplit.artifacts.digests import sha256_file
from ffsplit.artifacts.entries import FileEntry
from ffsplit.artifacts.inputs import StoredFiles
from ffsplit.artifacts.scratch import Scratch
from ffsplit.artifacts.stores import open_store
from ffsplit.config import Record
from ffsplit.errors import ConfigError
from ffsplit.models.folder import local_listing, sort_files


class ModelSource(Record):
    """Where a checkpoint is: on one host a path; on several a path they all see, or files in a store.

    `files` are what a host must find at the path, where there are several hosts. With `stored` the
    path is not looked at: every host fetches the files into its own cache.
    """

    path: str
    files: tuple[FileEntry, ...] = ()
    stored: StoredFiles | None = None

    def directory(self) -> Path:
        """The directory on this host. Raises ConfigError when this host does not see it."""
        if self.stored is not None:
            return self.stored.materialize()
        directory = Path(self.path)
        if all(_size(directory / entry.path) == entry.size_bytes for entry in self.files):
            return directory
        raise ConfigError(
            f"{directory}: host {socket.gethostname()} has joined and does not see these files: "
            "give a directory that all hosts share, or s3://bucket/prefix"
        )

    def is_here(self) -> bool:
        """Whether this host has the very files at the path, by their digests."""
        directory = Path(self.path)
        return all(
            _size(directory / entry.path) == entry.size_bytes
            and sha256_file(directory / entry.path) == entry.sha256
            for entry in self.files
        )


def described(directory: Path) -> ModelSource:
    """A local checkpoint with the digests of its files, all of which are read; its own code is among them."""
    entries = tuple(
        FileEntry(path=name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
        for name in sort_files(local_listing(directory)).wanted
        for path in [directory / name]
    )
    return ModelSource(path=str(directory), files=entries)


def staged(source: ModelSource, place: Scratch, *, once: bool) -> ModelSource:
    """A copy in the scratch that every host can have. `once`: what is there already is of this content."""
    store, prefix = open_store(place.uri), place.prefix
    there = {entry.key: entry.size_bytes for entry in store.list_details(prefix)} if once else {}
    for entry in source.files:
        if there.get(f"{prefix}/{entry.path}") != entry.size_bytes:
            store.put_file(f"{prefix}/{entry.path}", Path(source.path, entry.path).resolve())
    stored = StoredFiles(uri=f"{store.uri}/{prefix}", files=source.files)
    return ModelSource(path=source.path, stored=stored)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
