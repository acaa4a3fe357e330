"""What an S3 server really guarantees, found out by trying it. Few servers keep all that S3 promises."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ffsplit.artifacts.entries import StoreGuarantees
from ffsplit.artifacts.s3_errors import http_status
from ffsplit.errors import ConfigError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BODY = b"ffsplit"
_WRONG_CHECKSUMS = {
    "md5": {"ContentMD5": "AAAAAAAAAAAAAAAAAAAAAA=="},
    "crc32": {"ChecksumCRC32": "AAAAAA=="},
    "sha256": {"ChecksumSHA256": "A" * 43 + "="},
}
NUM_WRITERS = 8
NUM_ROUNDS = 3


def probe(client: S3Client, *, bucket: str, prefix: str, extra: dict[str, Any]) -> StoreGuarantees:
    """Write a few bytes under names of their own, and leave nothing behind.

    Raises ConfigError when If-None-Match is ignored, for then a commit could be overwritten, and
    whatever boto3 raises when nothing can be written at all.
    """
    names = [f"{prefix}ffsplit-probe-{secrets.token_hex(8)}" for _ in range(1 + NUM_ROUNDS)]

    def put(name: str, **options: Any) -> bool:
        """Whether the server took it."""
        try:
            client.put_object(Bucket=bucket, Key=name, Body=_BODY, **extra, **options)
        except ClientError as error:
            if http_status(error) in ("400", "409", "412", "422"):
                return False
            raise
        return True

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


def _num_winners(put: Any, name: str) -> int:
    """How many of several writers at once are told that they created a key."""
    start = threading.Barrier(NUM_WRITERS)

    def create(_: int) -> bool:
        start.wait()
        return bool(put(name, IfNoneMatch="*"))

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return sum(pool.map(create, range(NUM_WRITERS)))
