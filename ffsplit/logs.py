"""Structured logs: one JSON object per line on stderr, with FFSPLIT_LOG=json.

Every line has `time` (UTC), `level`, `event`, `host` and `pid`, and the fields of its context: `run` (the
key), `stage` and `item`, as in `shard-00003`. Workers write to their own stderr, which Ray keeps in the
session's logs. Values are names, numbers and counts, never configuration or environment.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Literal

from ffsplit import streams
from ffsplit.errors import ConfigError

LogFormat = Literal["text", "json"]
Field = str | int | float | bool | None
VARIABLE = "FFSPLIT_LOG"

_logger = logging.getLogger("ffsplit")
_fields: ContextVar[dict[str, Field] | None] = ContextVar("ffsplit_log_fields", default=None)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, tz=timezone.utc).isoformat(timespec="microseconds")
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= {"host": socket.gethostname(), "pid": str(record.process)}
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False)


class _Stderr(logging.Handler):
    """Writes to the current stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        streams.note(self.format(record))


def asked_for() -> LogFormat:
    """The format that FFSPLIT_LOG asks for. Raises ConfigError for an unknown one."""
    wanted = os.environ.get(VARIABLE) or "text"
    if wanted not in ("text", "json"):
        raise ConfigError(f"{VARIABLE} must be text or json: fix it, or unset it")
    return "json" if wanted == "json" else "text"


def ask_for(log_format: LogFormat) -> None:
    """Make this process and its children write logs in a format."""
    os.environ[VARIABLE] = log_format
    set_up(log_format)


def set_up(log_format: LogFormat) -> None:
    """Start writing log lines if the format is JSON. A second call changes nothing."""
    if log_format == "json" and not any(isinstance(each, _Stderr) for each in _logger.handlers):
        _logger.addHandler(_Stderr())
        _logger.setLevel(logging.INFO)
        _logger.propagate = False


def log(event: str, *, level: int = logging.INFO, **fields: Field) -> None:
    """Write one line, with the current fields."""
    _logger.log(level, event, extra={"fields": current() | fields})


def current() -> dict[str, Field]:
    """The fields that every line in this context has."""
    return dict(_fields.get() or {})


@contextmanager
def fields(**more: Field) -> Iterator[None]:
    """Add these fields to every line written in this context."""
    token = _fields.set(current() | more)
    try:
        yield
    finally:
        _fields.reset(token)
