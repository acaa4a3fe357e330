"""Sizes and spans of time as people write them."""

from __future__ import annotations

import re
from datetime import timedelta

from ffsplit.errors import ConfigError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", re.IGNORECASE | re.ASCII)
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_SPAN_DAYS = 36500


def parse_size(text: str, *, name: str) -> int:
    """Bytes in a size such as 500MB, 50GB or 1.5T. Raises ConfigError, in which `name` says where it was."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ConfigError(f"{name} {text}: give a size such as 500MB or 50GB")
    return int(float(match[1]) * _BYTES[match[2].upper()])


def parse_span(text: str, *, name: str) -> timedelta:
    """A span such as 90s, 30m, 12h or 7d. Raises ConfigError, in which `name` says where it was."""
    match = _SPAN.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else -1
    if not 0 <= seconds <= _MAX_SPAN_DAYS * 86400:
        raise ConfigError(f"{name} {text}: give a time such as 90s, 30m, 12h or 7d")
    return timedelta(seconds=seconds)
