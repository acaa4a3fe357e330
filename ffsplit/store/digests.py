"""Sizes and sha256 digests of the files of a directory."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ffsplit.errors import ArtifactError
from ffsplit.store.entries import FileEntry, is_safe_path
from ffsplit.store.manifest import UNLISTED

CHUNK_BYTES = 1 << 20
HASHED_AT_ONCE = 4 << 20
"""Large pieces: a hashing thread waits for the interpreter lock after each, while others transfer."""


def read_chunks(path: Path, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, or of a range of it, at most CHUNK_BYTES at a time. Raises OSError."""
    left = sys.maxsize if size_bytes is None else size_bytes
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(min(CHUNK_BYTES, left)):
            yield chunk
            left -= len(chunk)


def sha256_file(path: Path) -> str:
    """sha256 of a file as 64 hex digits, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        hash_range(file, digest, start=0, size_bytes=None)
    return digest.hexdigest()


def hash_range(file: FileIO, digest: hashlib._Hash, *, start: int, size_bytes: int | None) -> None:
    """Add a range of an unbuffered file to a digest, up to the end of the file. Raises OSError."""
    left = sys.maxsize if size_bytes is None else size_bytes
    piece = memoryview(bytearray(min(left, HASHED_AT_ONCE)))
    file.seek(start)
    while num_read := file.readinto(piece[: min(left, HASHED_AT_ONCE)]):
        digest.update(piece[:num_read])
        left -= num_read


def file_entries(directory: Path) -> tuple[FileEntry, ...]:
    """Every file below a directory except its manifest and signature, sorted, with size and digest.

    Raises ArtifactError for anything that an artifact must not contain (a symbolic link, a socket, a
    pipe, a name that is not safe in every store), and if the directory cannot be read.
    """
    files = list_files(directory)
    return tuple(file_entry(path, name) for name, path in files.items() if name not in UNLISTED)


def file_entry(path: Path, name: str) -> FileEntry:
    """Size and digest of one file, listed as `name`. Raises ArtifactError."""
    try:
        return FileEntry(path=name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


def list_files(directory: Path) -> dict[str, Path]:
    """Relative posix name to path of every file below a directory, sorted by name.

    Raises ArtifactError as `file_entries` does.
    """
    found: dict[str, Path] = {}
    try:
        _collect(directory, "", found)
    except OSError as error:
        raise ArtifactError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    return dict(sorted(found.items()))


def _collect(directory: Path, prefix: str, found: dict[str, Path]) -> None:
    with os.scandir(directory) as children:
        for child in children:
            name = prefix + child.name
            if not is_safe_path(name):
                raise ArtifactError(f"{name!r} in {directory} is not a valid file name for an artifact")
            if child.is_symlink():
                raise ArtifactError(f"{child.path} is a symbolic link: put the file itself into the artifact")
            if child.is_dir():
                _collect(Path(child.path), name + "/", found)
            elif child.is_file():
                found[name] = Path(child.path)
            else:
                raise ArtifactError(f"{child.path} is neither a file nor a directory")
