"""Files in stores and manifests: the names they may have, the records that list them, and their digests."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ffsplit.config import Record
from ffsplit.errors import ArtifactError, ConfigError

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"
LATEST_LINK = "latest"
"""In a directory where runs are published, the newest model. Buckets have no links."""
UNLISTED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
"""Files of an artifact that its manifest does not list."""

RUN_KEY = re.compile(r"[0-9a-f]{16}")
ATTEMPT_ID = re.compile(r"[0-9a-f]{12}")
MAX_NAME_BYTES = 255

_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control and invisible characters, lone surrogates, line separators: they mislead readers or break tools."""


def is_link(uri: str) -> bool:
    """Whether this is a link from `ffsplit share`."""
    return bool(re.match(r"https?://[^/\s]", uri, re.IGNORECASE))


def is_safe_path(path: str) -> bool:
    """Whether a path stays inside the directory it is relative to, on any system and in any store.

    A safe path has forward slashes only, none of them leading or trailing; no empty, `.` or `..`
    component; no backslash; no control or invisible character; and no component over 255 bytes.
    """
    if "\\" in path or any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in path):
        return False
    return all(
        part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in path.split("/")
    )


def colliding(paths: Iterable[str]) -> str | None:
    """A path that differs from another only in case or Unicode form: some file systems confuse the two."""
    seen: set[str] = set()
    for path in paths:
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            return path
        seen.add(folded)
    return None


def check_outside_attempts(path: str, *, flag: str) -> None:
    """Raise ConfigError if a path or URI lies in a published attempt: those are never written to."""
    above = (folder for folder in (Path(path), *Path(path).parents) if folder.name == LATEST_LINK)
    in_latest = any((folder / MANIFEST_NAME).is_file() for folder in above)
    if in_latest or re.search(rf"(^|/){RUN_KEY.pattern}/{ATTEMPT_ID.pattern}(/|$)", path):
        raise ConfigError(f"{flag} {path} lies in a published attempt: choose another place")


def check_absolute(target: str) -> None:
    """Raise ConfigError for a relative output: it would be lost with the job's copy of the directory."""
    if "://" not in target and not target.startswith(("/", "~")):
        raise ConfigError(f"{target} must be absolute in a job, whose working directory is a copy")


class FileEntry(Record):
    """One file of the artifact. `path` is relative to the attempt's directory, with forward slashes."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not is_safe_path(path):
            message = "{path} is not a plain relative path inside the artifact"
            raise PydanticCustomError("unsafe_path", message, {"path": repr(path)})
        return path


class LeftOut(Record):
    """A file of the model's folder that was not copied into the artifact."""

    path: str = Field(description="relative to the folder; ends with / for a whole folder")
    reason: str


class StoreGuarantees(Record):
    """What the store guarantees, as probed when the run began."""

    conditional_put: Literal["atomic", "not atomic"] = Field(
        description="atomic: when several writers created one key at once, at most one succeeded"
    )
    checksums: tuple[str, ...] = Field(
        description="checksum types the server verifies: it rejected a wrong value"
    )


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
