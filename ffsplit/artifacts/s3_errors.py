"""What botocore's errors mean to a user, as one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from ffsplit.artifacts.stores import MissingKey
from ffsplit.errors import ConfigError, FFSplitError, StoreError

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
"""How a body that was arriving can break off."""


class PastTheEnd(StoreError):
    """A range begins where the object has no bytes."""


@contextmanager
def s3_errors(action: str) -> Iterator[None]:
    """Turn an error of boto3 or of the local disk into a StoreError, MissingKey or ConfigError.

    `action` completes "cannot ..." and names the URI.
    """
    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error, OSError, RecursionError) as error:
        raise explain(error, action=action) from error


def explain(error: Exception, *, action: str) -> FFSplitError:
    """The error of this package that says the same in one line, with how to mend it."""
    error = _unwrap(error)
    if isinstance(error, ClientError):
        return _explain_reply(error, action=action)
    if isinstance(error, _NO_CREDENTIALS):
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use an instance role"
        return ConfigError(f"cannot {action}: {_line(error)}: {mend}")
    if "header value" in str(error):  # of a credential that is fetched anew: others are looked at before
        mend = "check the credentials, and AWS_SESSION_TOKEN: one has a character that no request may have"
        return ConfigError(f"cannot {action}: {mend}")
    if isinstance(error, _UNREACHABLE):
        mend = "check the network, AWS_ENDPOINT_URL_S3 and AWS_REGION"
        return StoreError(f"cannot {action}: {_line(error)}: {mend}")
    if isinstance(error, RecursionError):  # botocore goes on asking where a bucket is that is elsewhere
        mend = "set AWS_REGION to the bucket's region, or mend AWS_ENDPOINT_URL_S3"
        return ConfigError(
            f"cannot {action}: the server redirects without saying where (PermanentRedirect): {mend}"
        )
    if isinstance(error, OSError):
        return StoreError(f"cannot {action}: {error.filename or ''} {error.strerror or error}")
    return StoreError(f"cannot {action}: {_line(error)}")


def _explain_reply(error: ClientError, *, action: str) -> FFSplitError:
    details = error.response.get("Error", {})
    code, message = details.get("Code") or "unknown", " ".join((details.get("Message") or "").split())
    said = f"cannot {action}: {message or 'refused'} ({code})"
    if code == "NoSuchKey":  # a bare 404 may be a gateway's, or of a bucket that is gone
        return MissingKey(said)
    if code in ("InvalidRange", "416"):
        return PastTheEnd(said)
    if code == "NoSuchBucket":
        return ConfigError(f"{said}: create the bucket or mend the URI")
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
    """The cause inside the errors that the transfer manager wraps others in."""
    inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
    return inner if isinstance(error, Boto3Error) and isinstance(inner, Exception) else error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
