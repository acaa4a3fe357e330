"""Records that other versions of FFSplit read: their schema version, and how readers treat it.

`schema_version` is MAJOR.MINOR. A higher minor only adds fields: a reader ignores those that it does not
know, and writes them back. A higher major changes the meaning of fields: it is refused.
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import from_json

from ffsplit.config import Record
from ffsplit.errors import ArtifactError

SCHEMA_VERSION = "1.0"
AnyRecord = TypeVar("AnyRecord", bound=Record)


def _in_utc(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError("is not in UTC")
    return text


UtcTime = Annotated[str, AfterValidator(_in_utc), Field(description="UTC, ISO 8601")]


class NewerSchema(ArtifactError):
    """A record has a schema that this version does not read."""


class Versioned(Record):
    """A record with the version of its schema."""

    schema_version: str = Field(
        default=SCHEMA_VERSION, pattern=r"^[1-9][0-9]*\.[0-9]+$", description="MAJOR.MINOR"
    )


def read_record(kind: type[AnyRecord], data: str | bytes, *, name: str) -> AnyRecord:
    """Parse a stored record; unknown fields are kept.

    Raises NewerSchema for a newer major version, ArtifactError if the record is invalid.
    """
    try:
        from_json(data, allow_inf_nan=False)  # Infinity and NaN are not JSON, and would be written as null
    except ValueError:
        raise ArtifactError(f"{name} is not a JSON object") from None
    try:
        record = kind.model_validate_json(data, extra="allow")
    except ValidationError as error:
        fields = _fields_of(data)
        if fields is None:
            raise ArtifactError(f"{name} is not a JSON object") from None
        _refuse_newer(fields, name=name)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        shown = where if where.isprintable() else repr(where)
        raise ArtifactError(f"{name}: {f'{shown}: ' if shown else ''}{_line(first['msg'])}") from None
    if isinstance(record, Versioned):
        _refuse_newer(record.model_dump(), name=name)
    return record


def _fields_of(data: str | bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _refuse_newer(fields: dict[str, Any], *, name: str) -> None:
    match = re.match(r"[0-9]{1,9}", str(fields.get("schema_version", "")))
    ours = SCHEMA_VERSION.partition(".")[0]
    if match is None or int(match[0]) <= int(ours):
        return
    needed = str(fields.get("ffsplit_version", ""))
    known = re.fullmatch(r"\d+(\.\d+){0,3}", needed, re.ASCII)
    fix = f"pip install 'ffsplit>={needed}'" if known else "upgrade ffsplit"
    raise NewerSchema(f"{name} has schema {int(match[0])}; this version reads schema {ours}: {fix}")


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if line.isprintable() else repr(line)
