"""Text files, opened and taken apart: lines, JSON records and delimited rows. Errors name file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ffsplit.errors import ConfigError, explained

DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_MAX_FIELD_CHARACTERS = 2**31 - 1  # what a C long holds everywhere


def source_error(where: object, why: str) -> ConfigError:
    return ConfigError(f"cannot read texts from {where or 'an empty source'}: {why}")


def reading_texts(where: object, what: str = "", *, advice: str = "") -> AbstractContextManager[None]:
    """At the boundary to whatever reads a source: its errors become one line that names the source."""
    told = f"cannot read texts from {where or 'an empty source'}"
    return explained(f"{told}: {what}" if what else told, advice=advice)


def no_column(spec: str, column: str, columns: Sequence[str], *, noun: str = "column") -> ConfigError:
    """The error for a column that is missing from the spec, or from the source."""
    listed = ", ".join(repr(name[:40]) for name in columns[:20]) + (", ..." if len(columns) > 20 else "")
    wrong = f"there is no {noun} {column!r}" if column else f"no {noun} is named, write SOURCE#{noun}"
    return source_error(spec, f"{wrong}; the {noun}s there are {listed}")


def column_index(spec: str, column: str, columns: Sequence[str]) -> int:
    """Where a column stands among the source's. Raises ConfigError when it is missing, or there twice."""
    if column not in columns or not column:
        raise no_column(spec, column, columns)
    if (count := list(columns).count(column)) > 1:
        raise source_error(spec, f"{count} columns are named {column!r}; rename all but one")
    return list(columns).index(column)


def decoded(spec: str, path: Path) -> str:
    """The text of a UTF-8 file. Raises ConfigError when it is another encoding, or nothing but space."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        bad = error.object[error.start]
        raise source_error(
            f"{path}:{line}", f"byte 0x{bad:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise source_error(spec, "the file is empty; name a file with text in it")
    return text


def lines(text: str) -> io.StringIO:
    """Lines ended by LF, CRLF or CR alone; str.splitlines would also cut at U+2028 and form feeds."""
    return io.StringIO(text, newline=None)


def json_records(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines text, each with its file and line for error messages."""
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except Exception as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "unreadable"
            raise source_error(where, f"invalid JSON ({why}); write one object a line") from error
        if not isinstance(record, dict):
            raise source_error(where, "not a JSON object; write one object a line")
        yield where, record


def checked_text(where: str, field: str, value: object) -> str:
    """A field's value, when it is text that can be encoded."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise source_error(where, f"field {field!r} is {kind}, not a string; name a field of text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise source_error(where, f"field {field!r} holds half a surrogate pair; mend its \\u escapes")
    return value


def delimited_rows(text: str, path: Path, *, dialect: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    previous_limit = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise source_error(
            f"{path}:{reader.line_num}", f"{error}; mend its quotes, or save it as .tsv"
        ) from None
    finally:
        csv.field_size_limit(previous_limit)
