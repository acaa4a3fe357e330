"""A store in an S3 bucket, on Amazon or any S3-compatible server that honours If-None-Match."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from pydantic import Field

from ffsplit import __version__
from ffsplit.errors import ArtifactError, ConfigError, StoreError
from ffsplit.redaction import redacted
from ffsplit.store.entries import CHUNK_BYTES, StoreGuarantees
from ffsplit.store.s3_client import (
    BROKEN_STREAM,
    PastTheEnd,
    end_of_range,
    explain,
    http_status,
    make_client,
    s3_errors,
)
from ffsplit.store.schema import NewerSchema, UtcTime, Versioned, read_record
from ffsplit.store.store import (
    MAX_ATTEMPTS,
    MissingKey,
    Names,
    Stored,
    backoff_s,
    check_key,
    check_prefix,
    read_at_most,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import ObjectTypeDef

    Objects = list[ObjectTypeDef]
    from mypy_boto3_s3 import S3Client


_PART_BYTES = 8 << 20
_NUM_CONNECTIONS = 10
_CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json"}
_TRANSFER = TransferConfig(
    multipart_threshold=_PART_BYTES,
    multipart_chunksize=_PART_BYTES,
    max_concurrency=_NUM_CONNECTIONS,
    preferred_transfer_client="classic",  # awscrt ignores endpoint_url
)


class S3Store:
    """Keys are objects below a prefix of one bucket. Large files are sent in parts, several at a time."""

    def __init__(self, bucket: str, *, prefix: str) -> None:
        self._bucket = bucket
        self._base = f"{prefix}/" if prefix else ""
        self._client = make_client(self.uri)
        kms_key = os.environ.get("FFSPLIT_S3_SSE_KMS_KEY_ID")
        self._extra: dict[str, Any] = (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
        )

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._base}".rstrip("/")

    def put_bytes(self, key: str, data: bytes) -> None:
        with s3_errors(f"write {self._show(key)}"):
            self._put(key, data)

    def put_file(self, key: str, path: Path) -> None:
        with s3_errors(f"write {self._show(key)}"):
            size_bytes = path.stat().st_size
            name = self._name(key)
            self._client.upload_file(
                str(path), self._bucket, name, ExtraArgs=self._options(name) or None, Config=_TRANSFER
            )
            stored = self._client.head_object(Bucket=self._bucket, Key=name)["ContentLength"]
        if stored != size_bytes:
            raise StoreError(f"{self._show(key)} has {stored} of the {size_bytes} bytes of {path}: try again")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        for attempt in range(MAX_ATTEMPTS):
            try:
                with s3_errors(f"write {self._show(key)}"):
                    self._put(key, data, IfNoneMatch="*")
                return True
            except StoreError as error:
                status = _status_of(error)
                if status == "412":
                    with suppress(MissingKey):  # deleted meanwhile: do not report it as existing
                        return self.get_bytes(key) == data
                elif status != "409" or attempt + 1 == MAX_ATTEMPTS:
                    raise
            time.sleep(backoff_s(attempt))
        raise StoreError(f"cannot write {self._show(key)}: it kept appearing and disappearing: try again")

    def get_bytes(self, key: str) -> bytes:
        return b"".join(self.open_stream(key))

    def open_stream(self, key: str, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
        """The object, or a range, in chunks; a broken connection is resumed where it stopped."""
        if size_bytes == 0:
            return
        action = f"read {self._show(key)}"
        where: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        offset, failures = start, 0
        end = None if size_bytes is None else start + size_bytes
        while end is None or offset < end:
            where["Range"] = f"bytes={offset}-{'' if end is None else end - 1}"
            reply: Any = {}
            try:
                with s3_errors(action):
                    reply = self._client.get_object(**where)
                end = end_of_range(reply, start=offset)
                for chunk in reply["Body"].iter_chunks(CHUNK_BYTES):
                    offset += len(chunk)
                    failures = 0  # counts consecutive failures without progress
                    yield chunk
                return
            except PastTheEnd:
                return
            except BROKEN_STREAM as error:
                failures += 1
                if failures == MAX_ATTEMPTS:
                    raise explain(error, action=action) from error
                if reply.get("ETag", "").endswith('"'):
                    where["IfMatch"] = reply["ETag"]
                time.sleep(backoff_s(failures))

    def fetch(self, key: str, directory: Path) -> Path:
        target = directory / check_key(key)
        partial = target.with_name(f".ffsplit-{secrets.token_hex(8)}.tmp")
        try:
            with s3_errors(f"download {self._show(key)} to {directory}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._client.download_file(self._bucket, self._name(key), str(partial), Config=_TRANSFER)
                    os.replace(partial, target)
                finally:
                    partial.unlink(missing_ok=True)
        except StoreError as error:  # boto3 starts with a HEAD, whose 404 has no body to tell what is missing
            if _status_of(error) == "404" and not self.exists(key):
                raise MissingKey(f"{self._show(key)} does not exist") from error
            raise
        return target

    def exists(self, key: str) -> bool:
        """Reads one byte, because a refused HEAD has no body and so gives no reason."""
        try:
            with s3_errors(f"read {self._show(key)}"):
                where: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
                self._client.get_object(**where, Range="bytes=0-0")["Body"].read()
        except MissingKey:
            return False
        except PastTheEnd:
            return True
        return True

    def list(self, prefix: str) -> Iterator[str]:
        yield from (entry.key for entry in self.list_details(prefix))

    def list_details(self, prefix: str) -> Iterator[Stored]:
        entries = [
            Stored(
                entry["Key"].removeprefix(self._base),
                entry["Size"],
                entry["LastModified"],
                entry.get("ETag", ""),
            )
            for entry in self._objects(prefix)
            if not entry["Key"].endswith("/")
        ]
        yield from sorted(entries)

    def list_directories(self, prefix: str) -> Names:
        directory = self._directory(prefix)
        found: list[str] = []
        with s3_errors(f"list {self._show(prefix)}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=directory, Delimiter="/"
            )
            for page in pages:
                found += [entry["Prefix"].removeprefix(directory) for entry in page.get("CommonPrefixes", [])]
        return sorted(name.removesuffix("/") for name in found if name != "/")

    def delete(self, key: str) -> None:
        self._delete(self._name(key))

    def delete_prefix(self, prefix: str) -> None:
        check_key(check_prefix(prefix))
        names = [entry["Key"] for entry in self._objects(prefix)]
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            for _ in pool.map(self._delete, names):
                pass

    def presign(self, key: str, *, expires_s: int) -> str | None:
        with s3_errors(f"make a link to {self._show(key)}"):
            where = {"Bucket": self._bucket, "Key": self._name(key)}
            return self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=expires_s)

    def point(self, name: str, prefix: str) -> bool:
        return False

    def remove_leftovers(self, before: datetime, *, dry_run: bool) -> int:
        """Abort unfinished multipart uploads, which cost storage but appear in no listing of keys."""
        old: list[Any] = []
        with s3_errors(f"list unfinished uploads to {self.uri}"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._base
            )
            for page in pages:
                old += [upload for upload in page.get("Uploads", []) if upload["Initiated"] < before]
        for upload in [] if dry_run else old:
            with s3_errors(f"abort an upload to {self.uri}"):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
        return len(old)

    def check_writable(self) -> StoreGuarantees:
        """Probe the server, or read the result of an earlier probe and check that writing still works."""
        try:
            with s3_errors(f"write to {self.uri}"):
                record, is_ours = self._read_store_record()
                if record is not None and self._still_holds(record):
                    return record.guarantees
                found = probe(self._client, bucket=self._bucket, prefix=self._base, extra=self._extra)
                if is_ours:
                    self.put_bytes(STORE_RECORD, _record_bytes(found, endpoint=self._endpoint))
                return found
        except StoreError as error:
            if _is_outage(error.__cause__):
                raise
            raise ConfigError(str(error)) from error

    def _read_store_record(self) -> tuple[StoreRecord | None, bool]:
        """A record that is still valid, and whether it may be replaced (not if its schema is newer)."""
        try:
            data = read_at_most(self, STORE_RECORD, MAX_STORE_RECORD_BYTES)
            record = read_record(StoreRecord, data, name=f"{self.uri}/{STORE_RECORD}")
        except NewerSchema:
            return None, False
        except (ArtifactError, StoreError, ConfigError) as error:  # the probe reports what is wrong
            if _is_outage(error.__cause__):
                raise
            return None, True
        return (record if record.counts(endpoint=self._endpoint) else None), True

    def _still_holds(self, record: StoreRecord) -> bool:
        """Try to create the record, which exists: one write that changes nothing.

        A store that cannot be written to fails here, before any work. If the server accepts the write, it
        now ignores If-None-Match, as some do in a versioned bucket, or the record has just been deleted.
        """
        data = record.model_dump_json().encode()
        name = self._name(STORE_RECORD)
        return not _took(self._client, self._bucket, name, data, **self._options(name), IfNoneMatch="*")

    @property
    def _endpoint(self) -> str:
        return redacted(str(self._client.meta.endpoint_url))

    def _put(self, key: str, data: bytes, **condition: Any) -> None:
        name = self._name(key)
        self._client.put_object(Bucket=self._bucket, Key=name, Body=data, **self._options(name), **condition)

    def _options(self, name: str) -> dict[str, Any]:
        """Options of an upload: content type and encryption key."""
        content_type = _CONTENT_TYPES.get(Path(name).suffix)
        return self._extra | ({"ContentType": content_type} if content_type else {})

    def _delete(self, name: str) -> None:
        with s3_errors(f"delete s3://{self._bucket}/{name}"):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def _objects(self, prefix: str) -> Objects:
        found: Objects = []
        with s3_errors(f"list {self._show(prefix)}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._directory(prefix)
            )
            for page in pages:
                found += page.get("Contents", [])
        return found

    def _name(self, key: str) -> str:
        return self._base + check_key(key)

    def _directory(self, prefix: str) -> str:
        prefix = check_prefix(prefix)
        return f"{self._base}{prefix}/" if prefix else self._base

    def _show(self, key: str) -> str:
        return f"{self.uri}/{key}".rstrip("/")


def _status_of(error: StoreError) -> str:
    """The HTTP status of the reply behind an error, "" if there was no reply."""
    return http_status(error.__cause__) if isinstance(error.__cause__, ClientError) else ""


def _is_outage(cause: BaseException | None) -> bool:
    """Whether the server is temporarily unavailable (5xx or 429): not the user's mistake."""
    return isinstance(cause, ClientError) and (http_status(cause)[:1] == "5" or http_status(cause) == "429")


# The guarantees of an S3 server are probed, since few servers give all of Amazon's. The result is kept in the
# store, so that only the first run there has to probe.

STORE_RECORD = ".ffsplit/store.json"
MAX_STORE_RECORD_BYTES = 1 << 16
PROBE_AGAIN_AFTER = timedelta(days=30)

_BODY = b"ffsplit"
_WRONG_CHECKSUMS = {
    "md5": {"ContentMD5": "AAAAAAAAAAAAAAAAAAAAAA=="},
    "crc32": {"ChecksumCRC32": "AAAAAA=="},
    "sha256": {"ChecksumSHA256": "A" * 43 + "="},
}
NUM_WRITERS = 8
NUM_ROUNDS = 3


class StoreRecord(Versioned):
    """The result of a probe of this store, for later runs."""

    probed_at: UtcTime
    ffsplit_version: str = Field(description="the version that probed")
    endpoint: str = Field(description="the probed server: a copy of the bucket may be on another one")
    guarantees: StoreGuarantees

    def counts(self, *, endpoint: str) -> bool:
        """Whether it is from this server and recent. A wrong clock may have dated it in the future."""
        age = datetime.now(timezone.utc) - datetime.fromisoformat(self.probed_at)
        return self.endpoint == endpoint and abs(age) <= PROBE_AGAIN_AFTER


def _record_bytes(guarantees: StoreGuarantees, *, endpoint: str) -> bytes:
    record = StoreRecord(
        probed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ffsplit_version=__version__,
        endpoint=endpoint,
        guarantees=guarantees,
    )
    return (record.model_dump_json(indent=2) + "\n").encode()


def probe(client: S3Client, *, bucket: str, prefix: str, extra: dict[str, Any]) -> StoreGuarantees:
    """Probe the server with a few bytes under random names, and delete them.

    Raises ConfigError if the server ignores If-None-Match, since a commit could then be overwritten;
    passes on boto3's errors if nothing can be written at all.
    """
    names = [f"{prefix}ffsplit-probe-{secrets.token_hex(8)}" for _ in range(1 + NUM_ROUNDS)]

    def put(name: str, **options: Any) -> bool:
        return _took(client, bucket, name, _BODY, **extra, **options)

    try:
        client.put_object(Bucket=bucket, Key=names[0], Body=_BODY, **extra)
        checksums = [kind for kind, wrong in _WRONG_CHECKSUMS.items() if not put(names[0], **wrong)]
        if put(names[0], IfNoneMatch="*"):
            why = "the server ignores If-None-Match here, so two runs could commit under one key"
            mend = "use a server with conditional writes (older Ceph has them in buckets without versions)"
            raise ConfigError(f"cannot write to s3://{bucket}/{prefix}: {why}: {mend}")
        atomic = all(_num_winners(put, name) <= 1 for name in names[1:])
    finally:
        for name in names:
            client.delete_object(Bucket=bucket, Key=name)
    return StoreGuarantees(
        conditional_put="atomic" if atomic else "not atomic", checksums=tuple(sorted(checksums))
    )


def _took(client: S3Client, bucket: str, name: str, body: bytes, **options: Any) -> bool:
    """Whether the server accepted an upload that it should have refused."""
    try:
        client.put_object(Bucket=bucket, Key=name, Body=body, **options)
    except ClientError as error:
        if http_status(error) in ("400", "409", "412", "422"):
            return False
        raise
    return True


def _num_winners(put: Any, name: str) -> int:
    """How many of several concurrent writers were told that they created the key."""
    start = threading.Barrier(NUM_WRITERS)

    def create(_: int) -> bool:
        start.wait()
        return bool(put(name, IfNoneMatch="*"))

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return sum(pool.map(create, range(NUM_WRITERS)))
