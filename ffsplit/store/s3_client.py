"""The boto3 client: its settings, checked before use, and botocore's errors in one line each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import botocore.loaders
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.session import Session
from botocore import exceptions as boto
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    ProfileNotFound,
    ResponseStreamingError,
)

from ffsplit.errors import ConfigError, FFSplitError, StoreError
from ffsplit.store.store import MAX_ATTEMPTS, MissingKey, backoff_s

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


# What botocore's errors mean to a user, in one line each.

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.ProfileNotFound,
)
_UNREACHABLE = (boto.HTTPClientError, boto.EndpointConnectionError, boto.ConnectionError)
_DENIED = ("AccessDenied", "AllAccessDisabled", "Forbidden", "403")
_BAD_CREDENTIALS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
_WRONG_REGION = ("301", "AuthorizationHeaderMalformed", "PermanentRedirect")
BROKEN_STREAM = (
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    boto.ConnectionClosedError,
)
"""Errors of a body that breaks while it is being read."""


class PastTheEnd(StoreError):
    """A range begins at or after the end of the object."""


@contextmanager
def s3_errors(action: str) -> Iterator[None]:
    """Turn an error of boto3 or the local disk into a StoreError, MissingKey or ConfigError.

    `action` completes "cannot ..." and names the URI.
    """
    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error, OSError, RecursionError) as error:
        raise explain(error, action=action) from error


def explain(error: Exception, *, action: str) -> FFSplitError:
    """This package's error for a library's error, in one line, with how to fix it."""
    error = _unwrap(error)
    if isinstance(error, ClientError):
        return _explain_reply(error, action=action)
    if isinstance(error, _NO_CREDENTIALS):
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use an instance role"
        return ConfigError(f"cannot {action}: {_line(error)}: {mend}")
    if "header value" in str(error):  # only refreshed credentials get here: others are checked beforehand
        mend = "check the credentials and AWS_SESSION_TOKEN: one has a character not allowed in HTTP headers"
        return ConfigError(f"cannot {action}: {mend}")
    if isinstance(error, _UNREACHABLE):
        mend = "check the network, AWS_ENDPOINT_URL_S3 and AWS_REGION"
        return StoreError(f"cannot {action}: {_line(error)}: {mend}")
    if isinstance(error, RecursionError):  # botocore follows redirects for ever if the bucket is elsewhere
        mend = "set AWS_REGION to the bucket's region, or correct AWS_ENDPOINT_URL_S3"
        return ConfigError(
            f"cannot {action}: the server redirects without a target (PermanentRedirect): {mend}"
        )
    if isinstance(error, OSError):
        return StoreError(f"cannot {action}: {error.filename or ''} {error.strerror or error}")
    return StoreError(f"cannot {action}: {_line(error)}")


def _explain_reply(error: ClientError, *, action: str) -> FFSplitError:
    details = error.response.get("Error", {})
    code, message = details.get("Code") or "unknown", " ".join((details.get("Message") or "").split())
    said = f"cannot {action}: {message or 'refused'} ({code})"
    if code == "NoSuchKey":  # a bare 404 may come from a gateway, or mean a deleted bucket
        return MissingKey(said)
    if code in ("InvalidRange", "416"):
        return PastTheEnd(said)
    if code == "NoSuchBucket":
        return ConfigError(f"{said}: create the bucket or correct the URI")
    if code in _BAD_CREDENTIALS:
        mend = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE and the clock"
        return ConfigError(f"{said}: {mend}")
    if code in _WRONG_REGION:
        return ConfigError(f"{said}: set AWS_REGION to the bucket's region")
    if code in _DENIED:
        allow = "s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucket"
        return ConfigError(f"{said}: the bucket's policy must allow {allow}")
    return StoreError(said)


def http_status(error: ClientError) -> str:
    """The HTTP status of a refused request, as text: '412', '409'."""
    return str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def _unwrap(error: Exception) -> Exception:
    """The cause inside an error of the transfer manager."""
    inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
    return inner if isinstance(error, Boto3Error) and isinstance(inner, Exception) else error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


ALWAYS_READ = frozenset(
    {
        "AWS_MAX_ATTEMPTS",
        "AWS_METADATA_SERVICE_TIMEOUT",
        "AWS_METADATA_SERVICE_NUM_ATTEMPTS",
    }
)
"""Variables that botocore reads even if they are empty."""


class _Setting(NamedTuple):
    variables: tuple[str, ...]
    holds: Callable[[str], object]
    expected: str


def _one_of(*names: str) -> tuple[Callable[[str], object], str]:
    return lambda value: value in names, " or ".join(names)


def _is_endpoint(value: str) -> bool:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return False
    is_host = bool(re.fullmatch(r"[\w.:-]+", parts.hostname or "", re.ASCII))
    return parts.scheme in ("http", "https") and is_host and port != 0 and not re.search(r"\s", value)


_SETTINGS = (
    _Setting(tuple(sorted(ALWAYS_READ)), re.compile(r"[1-9]\d{0,8}").fullmatch, "a whole number, 1 or more"),
    _Setting(("AWS_RETRY_MODE",), *_one_of("standard", "adaptive", "legacy")),
    _Setting(
        ("AWS_REGION", "AWS_DEFAULT_REGION"),
        re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?").fullmatch,
        "a region such as eu-central-1",
    ),
    _Setting(
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_STS"),
        _is_endpoint,
        "a URL such as https://host or http://host:9000",
    ),
    _Setting(("AWS_CA_BUNDLE",), os.path.exists, "a file of certificates that exists"),
    _Setting(("AWS_WEB_IDENTITY_TOKEN_FILE",), os.path.isfile, "a file that exists"),
    _Setting(
        ("AWS_DEFAULTS_MODE",),
        *_one_of("legacy", "standard", "in-region", "cross-region", "mobile", "auto"),
    ),
    _Setting(
        ("AWS_STS_REGIONAL_ENDPOINTS", "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT"), *_one_of("regional", "legacy")
    ),
    _Setting(
        ("FFSPLIT_S3_CHECKSUM", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
        lambda value: value.lower() in ("when_required", "when_supported"),
        "when_required or when_supported",
    ),
    _Setting(("AWS_ACCOUNT_ID_ENDPOINT_MODE",), *_one_of("preferred", "required", "disabled")),
    _Setting(
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE",),
        lambda value: value.lower() in ("ipv4", "ipv6"),
        "ipv4 or ipv6",
    ),
    _Setting(
        ("FFSPLIT_S3_PATH_STYLE",), lambda value: value.lower() in ("1", "true", "0", "false"), "1 or 0"
    ),
)


def checked_session() -> botocore.session.Session:
    """A botocore session with valid settings and credentials. Raises ConfigError."""
    for setting in _SETTINGS:
        for name in setting.variables:
            value = os.environ.get(name)
            if value is not None and (value or name in ALWAYS_READ) and not setting.holds(value):
                raise ConfigError(f"{name} must be {setting.expected}: correct it, or unset it")
    session = botocore.session.get_session()
    try:
        session.get_scoped_config()
        _check_credentials(session)
    except ProfileNotFound:
        name = next(name for name in ("AWS_DEFAULT_PROFILE", "AWS_PROFILE") if os.environ.get(name))
        known = ", ".join(session.available_profiles[:10]) or "none"
        raise ConfigError(f"{name} names a profile that does not exist; known profiles: {known}") from None
    except ConfigParseError as error:
        path = error.kwargs["path"]
        raise ConfigError(
            f"{path} is not valid: correct it, or set AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE"
        ) from None
    return session


def _check_credentials(session: botocore.session.Session) -> None:
    """Raise ConfigError for characters not allowed in HTTP headers: the library would print the value."""
    found = session.get_credentials()
    if type(found) is not Credentials:  # none, or refreshed from time to time
        return
    for attribute, name in (
        ("access_key", "AWS_ACCESS_KEY_ID"),
        ("secret_key", "AWS_SECRET_ACCESS_KEY"),
        ("token", "AWS_SESSION_TOKEN"),
    ):
        value = getattr(found, attribute)
        if value and not re.fullmatch(r"[\x21-\x7e]{1,16384}", value):
            profile = session.profile or "default"
            where = name if found.method == "env" else f"{name.lower()} of the profile {profile}"
            raise ConfigError(
                f"{where} is not a valid credential: it has a space, a line break or a non-ASCII "
                "character, or is too long: copy it again"
            )


# The boto3 client: where its settings come from, and how incomplete replies are detected.
#
# boto3 finds credentials, region and endpoint by itself (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION,
# AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_MAX_ATTEMPTS, ...). Three settings are this package's own:
#
# FFSPLIT_S3_PATH_STYLE=1         put the bucket in the path, not in the host name
# FFSPLIT_S3_SSE_KMS_KEY_ID=...   encrypt every object with this KMS key
# FFSPLIT_S3_CHECKSUM=...         when_supported (boto3's default) or when_required, for older servers

_IN_EVERY_REPLY = {
    "CreateMultipartUpload": "UploadId",
    "UploadPart": "ETag",
    "GetObject": "ContentLength",
    "HeadObject": "ContentLength",
    "ListObjectsV2": "IsTruncated",
    "ListMultipartUploads": "IsTruncated",
}


def make_client(uri: str) -> S3Client:
    """A client with bounded retries and timeouts. Raises ConfigError for invalid settings."""
    try:
        with s3_errors(f"open {uri}"):
            session = checked_session()
            session.register_component("data_loader", _loader())
            region = os.environ.get("AWS_REGION") or None  # botocore reads only AWS_DEFAULT_REGION
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
    """The service descriptions, cached: reading them takes 0.1 s."""
    return botocore.loaders.create_loader()


def _retry_broken_reply(response: Any, operation: Any, attempts: int, **_: Any) -> float | None:
    """Retry if a reply broke off in its headers, which http.client takes for a complete, empty reply.

    Retry too if the body of a 404 is missing: only the body tells whether the key or the bucket is missing,
    or a gateway answered.

    Without this a broken listing would look like an empty store. Raises after the last attempt.
    """
    if response is None:
        return None
    http, parsed = response
    if operation.name == "GetObject" and parsed.get("Error", {}).get("Code") == "404":
        return backoff_s(attempts) if attempts < MAX_ATTEMPTS else None  # no body to tell what is missing
    expected = _IN_EVERY_REPLY.get(operation.name)
    if expected is None:
        return None
    if http.status_code >= 300 or expected in parsed:
        return None
    if attempts >= MAX_ATTEMPTS:
        raise ResponseStreamingError(error=f"the reply to {operation.name} is incomplete")
    return backoff_s(attempts)


def end_of_range(reply: Any, *, start: int) -> int:
    """The offset at which the bytes of a reply end, from Content-Length and Content-Range.

    Raises ResponseStreamingError if the two contradict each other: then one is incomplete.
    """
    end = start + int(reply["ContentLength"])
    if reply["ResponseMetadata"]["HTTPStatusCode"] == 206 or start:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.get("ContentRange", ""))
        if not match or (int(match[1]), int(match[2]) + 1) != (start, end):
            raise ResponseStreamingError(error="the headers of the reply are incomplete")
    return end
