"""The boto3 client: where its settings come from, and replies that broke off taken for what they are.

boto3 finds credentials, region and endpoint by itself (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION,
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_MAX_ATTEMPTS, ...). Three settings are this package's own:

FFSPLIT_S3_PATH_STYLE=1         put the bucket into the path, not into the host name
FFSPLIT_S3_SSE_KMS_KEY_ID=...   encrypt every object with this KMS key
FFSPLIT_S3_CHECKSUM=...         when_supported (boto3's default) or when_required, for older servers
"""

from __future__ import annotations

import os
import random
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import botocore.loaders
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import ResponseStreamingError

from ffsplit.artifacts.s3_errors import s3_errors
from ffsplit.artifacts.s3_settings import checked_session
from ffsplit.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_ATTEMPTS = 5
_IN_EVERY_REPLY = {
    "CreateMultipartUpload": "UploadId",
    "UploadPart": "ETag",
    "GetObject": "ContentLength",
    "HeadObject": "ContentLength",
    "ListObjectsV2": "IsTruncated",
    "ListMultipartUploads": "IsTruncated",
}


def make_client(uri: str) -> S3Client:
    """A client with bounded retries and time-outs. Raises ConfigError for settings that cannot be meant."""
    try:
        with s3_errors(f"open {uri}"):
            session = checked_session()
            session.register_component("data_loader", _loader())
            region = os.environ.get("AWS_REGION") or None  # botocore knows AWS_DEFAULT_REGION alone
            client = Session(botocore_session=session).client("s3", region_name=region, config=_config())
            retry: Any = _retry_broken_reply
            client.meta.events.register_last("needs-retry.s3", retry)
            return client
    except (StoreError, ValueError) as error:
        raise ConfigError(f"cannot open {uri}: {str(error).removeprefix(f'cannot open {uri}: ')}") from error


def _config() -> Config:
    retries: dict[str, Any] = {"mode": os.environ.get("AWS_RETRY_MODE") or "standard"}
    options: dict[str, Any] = {"retries": retries, "signature_version": "s3v4"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = MAX_ATTEMPTS
    if os.environ.get("FFSPLIT_S3_PATH_STYLE", "").lower() in ("1", "true"):
        options["s3"] = {"addressing_style": "path"}
    if checksum := os.environ.get("FFSPLIT_S3_CHECKSUM"):
        options["request_checksum_calculation"] = options["response_checksum_validation"] = checksum
    return Config(connect_timeout=10, read_timeout=60, max_pool_connections=32, **options)


@cache
def _loader() -> botocore.loaders.Loader:
    """The descriptions of the service, which take a tenth of a second to read."""
    return botocore.loaders.create_loader()


def _retry_broken_reply(response: Any, operation: Any, attempts: int, **_: Any) -> float | None:
    """Ask again when a reply broke off in its headers, which http.client takes for a whole, empty one.

    So too where a 404 broke off: only a body says whether the key is missing, or a bucket or a gateway.

    Without this an unlucky listing would be an empty store. Raises when it goes on happening.
    """
    if response is None:
        return None
    http, parsed = response
    if operation.name == "GetObject" and parsed.get("Error", {}).get("Code") == "404":
        return backoff_s(attempts) if attempts < MAX_ATTEMPTS else None  # what is missing was not said
    expected = _IN_EVERY_REPLY.get(operation.name)
    if expected is None:
        return None
    if http.status_code >= 300 or expected in parsed:
        return None
    if attempts >= MAX_ATTEMPTS:
        raise ResponseStreamingError(error=f"the reply to {operation.name} broke off")
    return backoff_s(attempts)


def end_of_range(reply: Any, *, start: int) -> int:
    """Where the bytes that a reply brings end, by both headers that tell it.

    Raises ResponseStreamingError when they contradict each other: one of them broke off.
    """
    end = start + int(reply["ContentLength"])
    if reply["ResponseMetadata"]["HTTPStatusCode"] == 206 or start:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.get("ContentRange", ""))
        if not match or (int(match[1]), int(match[2]) + 1) != (start, end):
            raise ResponseStreamingError(error="the headers of the reply broke off")
    return end


def backoff_s(attempt: int) -> float:
    """Seconds to wait before the next attempt: doubling from 0.1, with jitter."""
    return float(0.1 * 2**attempt * random.uniform(0.5, 1.0))
