"""Share an artifact with users who have no credentials: one link leads to the links of all files.

.shares/<expiry>-<random>/share.json     the links to all files; itself read through a link until it expires
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from urllib.parse import urlsplit

import urllib3
from pydantic import Field, field_validator

from ffsplit.errors import ArtifactError, ConfigError, StoreError
from ffsplit.store.artifact import Location, locate, read_manifest
from ffsplit.store.entries import CHUNK_BYTES, MANIFEST_NAME, SIGNATURE_NAME, is_link, is_safe_path
from ffsplit.store.schema import NewerSchema, Versioned, read_record
from ffsplit.store.store import MAX_ATTEMPTS, MissingKey, backoff_s

SHARES_PREFIX = ".shares"
SHARE_NAME = "share.json"
MAX_SHARE_BYTES = 64 << 20
MAX_EXPIRY = timedelta(days=7)
"""The maximum lifetime of an S3 signature."""


class Share(Versioned):
    """Links to the files of one artifact, by path, and when they expire."""

    run_key: str
    attempt: str
    expires_at: str = Field(description="UTC, ISO 8601")
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _are_links(cls, files: dict[str, str]) -> dict[str, str]:
        for path, url in files.items():
            if not is_safe_path(path) or not is_link(url):
                raise ValueError(f"{path!r} is not a safe path, or its link is not an http(s) URL")
        return files


def share(uri: str, *, expires: timedelta) -> str:
    """A link that `ffsplit pull` accepts without credentials, until it expires.

    The links are signed with this user's credentials and stop working when those expire. Raises
    ConfigError for a store without links, and for an expiry above seven days.
    """
    if not timedelta(seconds=1) <= expires <= MAX_EXPIRY:
        raise ConfigError("--expires: give at least 1s and at most 7d, the most that S3 allows")
    location = locate(uri)
    manifest = read_manifest(location)
    ends_at = datetime.now(timezone.utc) + expires
    names = [entry.path for entry in manifest.files] + [MANIFEST_NAME]
    names += [SIGNATURE_NAME] if location.store.exists(location.key(SIGNATURE_NAME)) else []
    record = Share(
        run_key=manifest.run_key,
        attempt=manifest.attempt,
        expires_at=ends_at.isoformat(timespec="seconds"),
        files={name: _presign(location, location.key(name), expires) for name in names},
    )
    key = f"{SHARES_PREFIX}/{ends_at:%Y%m%dT%H%M%SZ}-{secrets.token_hex(8)}/{SHARE_NAME}"
    link = _presign(location, key, expires)
    location.store.put_bytes(key, record.model_dump_json(indent=2).encode())
    return link


def _presign(location: Location, key: str, expires: timedelta) -> str:
    url = location.store.presign(key, expires_s=int(expires.total_seconds()))
    if url is None:
        raise ConfigError(f"{location.uri} cannot be shared by link: only artifacts in s3:// can")
    return url


def has_expired(share_directory: str, now: datetime) -> bool:
    """Whether the links of a directory below .shares/ have expired."""
    stamp = share_directory.partition("-")[0]
    try:
        return datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc) < now
    except ValueError:
        return False


class LinkedFiles:
    """The files of a share, read over plain HTTP. Errors never show a link's signature."""

    def __init__(self, link: str) -> None:
        retries = urllib3.Retry(
            total=MAX_ATTEMPTS, redirect=0, status_forcelist=(500, 502, 503, 504), backoff_factor=0.2
        )
        timeout = urllib3.Timeout(connect=10, read=60)
        self._pool = urllib3.PoolManager(maxsize=16, retries=retries, timeout=timeout)
        self.uri = _without_signature(link)
        data = b"".join(self._stream(link, start=0, size_bytes=MAX_SHARE_BYTES + 1))
        try:
            if len(data) > MAX_SHARE_BYTES:
                raise ValueError
            self.share = read_record(Share, data, name=self.uri)
        except NewerSchema:
            raise
        except (ArtifactError, ValueError):
            raise ConfigError(f"{self.uri} is not a share link: create one with `ffsplit share`") from None

    def open_stream(self, key: str, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
        """A file of the artifact, or a range of it. Raises MissingKey if the share does not list it."""
        if key not in self.share.files:
            raise MissingKey(f"{self.uri} does not list {key}")
        yield from self._stream(self.share.files[key], start=start, size_bytes=size_bytes)

    def _stream(self, link: str, *, start: int, size_bytes: int | None) -> Iterator[bytes]:
        """The bytes behind a link; a broken connection is resumed where it stopped."""
        offset, end, failures = start, None if size_bytes is None else start + size_bytes, 0
        while end is None or offset < end:
            try:
                with self._get(link, f"bytes={offset}-{'' if end is None else end - 1}") as reply:
                    if reply.status == 416:
                        return
                    if offset and reply.status != 206:
                        raise StoreError(f"{_without_signature(link)} cannot be read in parts")
                    if "Content-Length" not in reply.headers and "Transfer-Encoding" not in reply.headers:
                        raise urllib3.exceptions.ProtocolError("the headers of the reply are incomplete")
                    for chunk in reply.stream(CHUNK_BYTES):
                        offset, failures = offset + len(chunk), 0
                        yield chunk
                    return
            except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError) as error:
                failures += 1
                if failures == MAX_ATTEMPTS:
                    shown = _without_signature(link)
                    raise StoreError(f"cannot read {shown}: the connection keeps breaking") from error
                time.sleep(backoff_s(failures))

    @contextmanager
    def _get(self, link: str, byte_range: str) -> Iterator[urllib3.BaseHTTPResponse]:
        shown = _without_signature(link)
        headers = {"Range": byte_range, "Accept-Encoding": "identity"}
        try:
            reply = self._pool.request("GET", link, headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            why = type(getattr(error, "reason", None) or error).__name__
            raise StoreError(f"cannot read {shown}: {why}: check the network") from None
        try:
            if reply.status in (400, 401, 403):
                raise ConfigError(f"{shown} is not accessible or has expired: ask for a new link")
            if reply.status in (404, 410):
                raise MissingKey(f"{shown} does not exist")
            if reply.status not in (200, 206, 416):
                raise StoreError(f"cannot read {shown}: HTTP status {reply.status}")
            yield reply
        finally:
            reply.close()
            reply.release_conn()


def _without_signature(link: str) -> str:
    parts = urlsplit(link)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
