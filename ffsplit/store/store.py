"""The protocol of a store of artifacts, a small one over string keys, and the URIs that name a store."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote

from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, StoreError
from ffsplit.store.entries import StoreGuarantees, is_safe_path

Names = list[str]
"""Defined here because `list` inside a store class is its method."""

NOT_ATOMIC = "lets two writers create one key at once: of two runs with the same key the last commit wins"
"""The warning for a store whose conditional writes are not atomic."""

MAX_ATTEMPTS = 5
"""Attempts per request, the first included."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")


class MissingKey(StoreError):
    """The store holds nothing under this key."""


class Stored(NamedTuple):
    """One key of a listing."""

    key: str
    size_bytes: int
    modified_at: datetime
    etag: str = ""
    """What an S3 server calls these bytes: its times have whole seconds."""


class Source(Protocol):
    """Anything that files can be read from: a store, or links to the files."""

    def open_stream(self, key: str, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
        """A value of any size, or a range of it, in chunks of about 1 MiB. Raises MissingKey.

        A range that reaches beyond the value's end is cut there.
        """


class Store(Source, Protocol):
    """Bytes under keys. Keys are relative to the store's root and separated by '/'.

    A prefix is a directory's name, with or without a trailing slash; "" is the root. A key appears
    completely or not at all. Every method raises StoreError if the store fails, and ValueError for a
    key that leaves the root. A store is thread-safe; other processes open their own by `uri`.
    """

    @property
    def uri(self) -> str:
        """The root: an absolute path or s3://bucket/prefix, without a trailing slash."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small value, replacing any existing one."""

    def put_file(self, key: str, path: Path) -> None:
        """Copy a file of any size, replacing any existing value; the stored size is checked."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small value unless the key exists, atomically; False if it exists.

        S3 cannot tell a lost reply from another writer's success, so there the result is True if the key
        already holds the same bytes: make them unique to the writer.
        """

    def get_bytes(self, key: str) -> bytes:
        """A small value. Raises MissingKey."""

    def fetch(self, key: str, directory: Path) -> Path:
        """A local file with the value: in place, or downloaded to `directory/key`. Raises MissingKey."""

    def exists(self, key: str) -> bool:
        """Whether there is a value under this key."""

    def list(self, prefix: str) -> Iterator[str]:
        """All keys below a prefix, sorted; none when it does not exist."""

    def list_details(self, prefix: str) -> Iterator[Stored]:
        """Like `list`, with sizes and the times of the last write by the store's clock."""

    def list_directories(self, prefix: str) -> Names:
        """The names of the directories right below a prefix, sorted."""

    def delete(self, key: str) -> None:
        """Remove a value; does nothing if it is missing."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove everything below a prefix, which must not be the root."""

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A link with which anybody can read a value until it expires; None if the store has no links."""

    def point(self, name: str, prefix: str) -> bool:
        """Make `name` stand for the directory of an artifact, for programs that read directories.

        In a directory it becomes a symbolic link, or a directory with the same files where the file system
        has no such links. In a bucket this does nothing. Returns whether anything changed. Raises StoreError
        if `name` is something else.
        """

    def remove_leftovers(self, before: datetime, *, dry_run: bool) -> int:
        """Remove invisible leftovers of killed writes older than `before`; returns how many there were."""

    def check_writable(self) -> StoreGuarantees:
        """Try writing, and return what the store guarantees. Leaves only a record of the result behind.

        Raises ConfigError, with how to fix it, if values cannot be written or commits could not work.
        """


def read_at_most(source: Source, key: str, max_bytes: int) -> bytes:
    """A small value from an untrusted source. Raises MissingKey, and StoreError if it is larger."""
    data = b"".join(source.open_stream(key, size_bytes=max_bytes + 1))
    if len(data) > max_bytes:
        raise StoreError(f"{key} is larger than {max_bytes:,} bytes")
    return data


def check_key(key: str) -> str:
    """The key itself. Raises ValueError when it could leave the store's root."""
    if not is_safe_path(key):
        raise ValueError(f"{key!r} is not a valid key")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix without its trailing slash. Raises ValueError when it could leave the store's root."""
    prefix = prefix.removesuffix("/")
    return check_key(prefix) if prefix else prefix


def root_uri(uri: str) -> str:
    """The `uri` of the store that s3://bucket/prefix, a path or file:///path names, without opening it.

    Raises ConfigError for an invalid URI.
    """
    match = _SCHEME.fullmatch(uri)
    scheme, rest = (match[1].lower(), match[2]) if match else ("", uri)
    if scheme == "s3":
        return "s3://" + "/".join(filter(None, parse_s3(rest)))
    if scheme == "hf":
        raise ConfigError(
            f"{uri} is not a store: use s3://bucket/prefix or a local path, then `ffsplit push URI {rest}`"
        )
    if scheme not in ("", "file"):
        raise ConfigError(f"{scheme}:// is not a supported store: use s3://bucket/prefix or a local path")
    return str(parse_file_url(rest) if scheme else parse_path(uri))


def open_store(uri: str) -> Store:
    """The store that a URI names. It need not exist; nothing is read or written yet.

    Raises ConfigError for an invalid URI or invalid S3 settings.
    """
    root = root_uri(uri)
    if root.startswith("s3://"):
        from ffsplit.store.s3 import S3Store

        bucket, _, prefix = root.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix=prefix)
    from ffsplit.store.local import LocalStore

    return LocalStore(Path(root))


def parse_s3(rest: str) -> tuple[str, str]:
    """Bucket and prefix of what follows s3://. Raises ConfigError."""
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if "@" in bucket:
        raise ConfigError("an s3:// URI takes no credentials: set AWS_ACCESS_KEY_ID or AWS_PROFILE instead")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{'s3://' + rest!r} names no bucket: write s3://bucket/prefix")
    if prefix and not is_safe_path(prefix):
        raise ConfigError(f"{prefix!r} is not a prefix: no empty, '.' or '..' parts, no control characters")
    return bucket, prefix


def parse_file_url(rest: str) -> Path:
    """The absolute path of what follows file://. Raises ConfigError."""
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"{'file://' + rest!r} names no local file: write file:///absolute/path")
    return parse_path("/" + unquote(path).lstrip("/"))


def parse_path(text: str) -> Path:
    """An absolute path; `~/` is the home directory. Raises ConfigError."""
    if re.match(r"hf:", text, re.IGNORECASE):
        root_uri(f"hf://{text[3:]}")
    if re.match(r"(s3|file):", text, re.IGNORECASE):
        raise ConfigError(f"{text!r} lacks slashes: write s3://bucket/prefix or file:///path")
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is not a path")
    path = Path(text)
    return user_path(path) if path.parts[:1] == ("~",) else path.absolute()


def backoff_s(attempt: int) -> float:
    """Seconds to wait before the next attempt: doubling from 0.1, with jitter."""
    return float(0.1 * 2**attempt * random.uniform(0.5, 1.0))
