"""Settings of S3 that cannot be meant, each in one line that names the variable and never shows its value."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import botocore.session
from botocore.credentials import Credentials
from botocore.exceptions import ConfigParseError, ProfileNotFound

from ffsplit.errors import ConfigError

ALWAYS_READ = frozenset(
    {
        "AWS_MAX_ATTEMPTS",
        "AWS_METADATA_SERVICE_TIMEOUT",
        "AWS_METADATA_SERVICE_NUM_ATTEMPTS",
    }
)
"""What botocore reads although it is empty."""


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
    """A session of botocore whose settings and credentials can be used. Raises ConfigError."""
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
        raise ConfigError(f"{name} names a profile that does not exist; there are: {known}") from None
    except ConfigParseError as error:
        path = error.kwargs["path"]
        raise ConfigError(
            f"{path} does not parse: correct it, or set AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE"
        ) from None
    return session


def _check_credentials(session: botocore.session.Session) -> None:
    """Raise ConfigError where one has characters that no request may have; an HTTP library would quote it."""
    found = session.get_credentials()
    if type(found) is not Credentials:  # none, or fetched anew now and then
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
                f"{where} is not a credential: it has a blank, a line break or a character that is not "
                "ASCII, or is too long: copy it again"
            )
