"""Texts to calibrate on, read from a file, the Hugging Face hub or what Python and this package ship.

A source is named by one string, the SPEC of `--calibration`; the forms are listed in `FORMS`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ffsplit.calibration.builtin_text import BUILTINS
from ffsplit.errors import ConfigError, explained, reason_of

# Text files: lines, and the rows of .csv, .tsv and .jsonl. Errors name file and line.

_DIALECTS: dict[str, dict[str, Any]] = {
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


def table_rows(spec: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """The chosen cells of each row of a .csv, .tsv or .jsonl file, with its file and line for error messages.

    A column is a name or, but for JSON Lines, a 0-based index. The first row of a table is left out as its
    header if any column is chosen by name. No columns: every cell of a table's row.
    """
    text, suffix = decoded(spec, path), "." + path.name.rpartition(".")[2].lower()
    if suffix == ".jsonl":
        for where, record in json_records(text, path):
            for field in columns:
                if field not in record or not field:
                    raise no_column(where, field, list(record), noun="field")
            yield where, [record[field] for field in columns]
        return
    rows = _delimited_rows(text, path, dialect=_DIALECTS[suffix])
    header = rows[0][1]
    indices = [_column_index(spec, column, header) for column in columns] or range(0)
    for where, row in rows if all(map(is_index, columns)) else rows[1:]:
        if max(indices, default=0) >= len(row):
            why = f"the row has {len(row)} column(s), not {len(header)}; mend its delimiters or quotes"
            raise source_error(where, why)
        yield where, [row[index] for index in indices] if columns else row


def is_index(column: str) -> bool:
    return column.isascii() and column.isdigit()


def _column_index(spec: str, column: str, header: Sequence[str]) -> int:
    """Digits are a 0-based index, whatever the header says."""
    if not is_index(column):
        return column_index(spec, column, header)
    if int(column) >= len(header):
        last = len(header) - 1
        raise source_error(spec, f"no column {column}: its {len(header)} column(s) are numbered 0 to {last}")
    return int(column)


def json_records(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _delimited_rows(text: str, path: Path, *, dialect: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The rows that are not blank, each with its file and the number of its last line."""
    previous_limit = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        return [(f"{path}:{reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise source_error(
            f"{path}:{reader.line_num}", f"{error}; mend its quotes, or save it as .tsv"
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def checked_text(where: str, field: str, value: object) -> str:
    """A field's value, when it is text that can be encoded."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise source_error(where, f"field {field!r} is {kind}, not a string; name a field of text")
    try:
        value.encode()
    except UnicodeEncodeError:
        why = f"field {field!r} holds half a surrogate pair; mend its \\u escapes"
        raise source_error(where, why) from None
    return value


FORMS = (
    "file.txt, file.jsonl#field, file.csv#column, file.tsv#column, file.parquet#column, "
    "hf:dataset[:config]#column@split, builtin:text, builtin:pydoc"
)

_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(.*)", re.DOTALL)  # two characters at least: C:\ is a drive
_FILE = re.compile(r"(?P<path>.+?(?P<suffix>\.(txt|jsonl|csv|tsv|parquet)))(#(?P<column>.*))?", re.I | re.S)
_HUB = re.compile(r"(?P<name>[^:#@]+)(?::(?P<config>[^#]+))?#(?P<column>.+)@(?P<split>[^@]+)")


def read_texts(spec: str) -> list[str]:
    """The texts of one source, in its order, stripped, without the empty ones.

    Raises ConfigError in one line when `spec` has no known form or the source gives no text.
    """
    texts = [text for text in map(str.strip, _read(spec)) if text]
    if not texts:
        raise source_error(spec, "no text left, everything there is empty; name another file or column")
    return texts


def read_column(spec: str) -> list[str]:
    """The texts of one source as they are, the empty ones too, so that columns stay side by side."""
    return _read(spec)


def read_all(specs: Sequence[str]) -> list[str]:
    """The texts of every source, one source after the other."""
    return [text for spec in specs for text in read_texts(spec)]


def _read(spec: str) -> list[str]:
    scheme = _SCHEME.fullmatch(spec)
    if scheme:
        reader = _SCHEMES.get(scheme[1])
        if reader is None:
            raise source_error(spec, f"unknown scheme {scheme[1] + ':'!r}; the known forms are {FORMS}")
        return reader(spec, scheme[2])
    file = _FILE.fullmatch(spec)
    path = Path(file["path"] if file else spec)
    with reading_texts(spec, advice="check the file"):
        if spec and path.is_dir():
            raise source_error(spec, "it is a directory; name a file in it")
        if file is None:
            suffix = f"unknown suffix {path.suffix!r}" if path.suffix else "unknown form"
            raise source_error(spec, f"{suffix}; the known forms are {FORMS}")
        if not path.exists():
            raise source_error(spec, "the file does not exist; check the path")
        return _SUFFIXES[file["suffix"].lower()](spec, path, file["column"] or "")


# ---- files: one reader a suffix ------------------------------------------------------------------


def _read_txt(spec: str, path: Path, column: str) -> list[str]:
    if column:
        raise source_error(spec, f"a .txt file has no columns; write {path}")
    return list(lines(decoded(spec, path)))


def _read_table(spec: str, path: Path, column: str) -> list[str]:
    return [checked_text(where, column, cell) for where, (cell,) in table_rows(spec, path, [column])]


def _read_parquet(spec: str, path: Path, column: str) -> list[str]:
    return _strings(spec, column, parquet_column(spec, path, column).to_pylist())


def parquet_column(spec: str, path: Path, column: str) -> Any:
    """One column of a Parquet file, as Arrow has it. Raises ConfigError when there is none to be read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column_index(spec, column, file.schema_arrow.names)
            return file.read(columns=[column]).column(column)
    except ConfigError:
        raise
    except Exception as error:
        why = f"not a Parquet file that can be read ({reason_of(error)})"
        raise source_error(spec, why) from error


# ---- schemes: one reader each --------------------------------------------------------------------


def _read_hub(spec: str, rest: str) -> list[str]:
    match = _HUB.fullmatch(rest)
    if match is None:
        raise source_error(spec, "write hf:dataset[:config]#column@split, for example hf:imdb#text@train")
    column = match["column"]
    try:
        import datasets

        dataset = datasets.load_dataset(match["name"], match["config"], split=match["split"])
        column_index(spec, column, dataset.column_names)
        values = list(dataset[column])
    except ConfigError:
        raise
    except Exception as error:  # the hub, the network and every dataset have errors of their own
        why = f"{type(error).__name__}: {reason_of(error)}"
        raise source_error(
            spec, f"{why}; check the name, the network and HF_TOKEN, or name a file"
        ) from error
    return _strings(spec, column, values)


def _read_s3(spec: str, rest: str) -> list[str]:
    from ffsplit.store.cache import fetch_file

    uri, hash_mark, column = spec.partition("#")
    path = str(fetch_file(uri))
    try:
        return _read(path + hash_mark + column)
    except ConfigError as error:
        raise ConfigError(str(error).replace(path, uri)) from None


def _strings(spec: str, column: str, values: Sequence[object]) -> list[str]:
    """The values of a typed column as texts; a null is an empty text."""
    texts = ["" if value is None else value for value in values]
    for value in texts:
        if not isinstance(value, str):
            raise source_error(
                spec, f"column {column!r} holds {type(value).__name__}, not text; name another"
            )
    return [text for text in texts if isinstance(text, str)]


def _read_builtin(spec: str, name: str) -> list[str]:
    if name not in BUILTINS:
        known = " and ".join(f"builtin:{each}" for each in BUILTINS)
        raise source_error(spec, f"unknown builtin {name!r}; there are {known}")
    try:
        return BUILTINS[name]()
    except ImportError:
        raise source_error(spec, "this Python came without pydoc_data; name a file") from None


_SUFFIXES: dict[str, Callable[[str, Path, str], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_table,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
_SCHEMES: dict[str, Callable[[str, str], list[str]]] = {
    "hf": _read_hub,
    "builtin": _read_builtin,
    "s3": _read_s3,
}
