"""What tasks share: their files, batches that keep track of order, and the score."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.calibration.sources import checked_text, decoded, is_index, source_error, table_rows
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, explained
from ffsplit.models.checkpoint import Checkpoint

# Scoring: batches that keep track of order, and the score.

BATCH_TOKENS = 4096
NO_LIMIT = 1 << 20


class Score(NamedTuple):
    """One metric of one task. `num_examples` counts rows, or predicted tokens of running text."""

    name: str
    metric: str
    value: float
    num_examples: int
    higher_is_better: bool | None = True


def longest_row(checkpoint: Checkpoint) -> int:
    """The most tokens that the model reads at once; a million if its config sets no limit."""
    return checkpoint.max_positions or NO_LIMIT


def ordered_batches(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int
) -> Iterator[tuple[list[int], Batch]]:
    """Padded batches on the model's device, each with the indices of its texts. Every text is in one.

    A text without tokens becomes one padding token, so that it gets a result too. If the model names no
    padding token, each batch is a single row: the model could not tell where padded rows end.
    """
    longest = min(max_length, tokenizer.model_max_length)
    pad_id = getattr(model.config, "pad_token_id", None)
    batch_tokens = 1 if pad_id is None else BATCH_TOKENS
    encoded = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    rows = [ids or [pad_id or 0] for ids in encoded]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    start = 0
    for batch in padded_batches(rows, batch_tokens=batch_tokens, pad_id=pad_id or 0):
        stop = start + len(batch.input_ids)
        yield order[start:stop], batch.to(model.device)
        start = stop


TABLES = (".csv", ".tsv", ".jsonl")

_FILE = re.compile(r"(?P<path>.+?(?P<suffix>\.(csv|tsv|jsonl|txt)))(#(?P<columns>.*))?", re.I | re.S)
_HEADER_CELL = re.compile(r"[A-Za-z_][\w.-]*")  # one word; sentences have several


class TaskFile(NamedTuple):
    """A file as `--eval` names it. `columns` are names or 0-based indices; empty means the default ones."""

    spec: str
    path: Path
    suffix: str
    columns: tuple[str, ...]


class Row(NamedTuple):
    """The chosen cells of one row, stripped, and its file and line."""

    where: str
    cells: tuple[str, ...]


def task_error(spec: str, why: str) -> ConfigError:
    return ConfigError(f"cannot evaluate {spec}: {why}")


def task_file(spec: str, *, suffixes: Sequence[str]) -> TaskFile:
    """Parse `task:file.suffix#columns`. Raises ConfigError if there is no such file."""
    rest = spec.partition(":")[2]
    match = _FILE.fullmatch(rest)
    suffix = match["suffix"].lower() if match else Path(rest).suffix
    if match is None or suffix not in suffixes:
        raise task_error(spec, f"it needs a file that ends in {' or '.join(suffixes)}, not {rest!r}")
    path = user_path(match["path"])
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise task_error(spec, f"{path} {problem}; check the path")
    columns = tuple(match["columns"].split(",")) if match["columns"] is not None else ()
    return TaskFile(spec, path, suffix, columns)


def read_decoded(file: TaskFile) -> str:
    """The file's text. Raises ConfigError when it cannot be read, is not UTF-8 or is empty."""
    with explained(f"cannot evaluate {file.spec}"):
        return decoded(file.spec, file.path)


def read_rows(file: TaskFile, *, names: Sequence[str], is_value: Callable[[str], bool]) -> list[Row]:
    """The chosen columns of every row, one per name in `names`.

    If the file chooses no columns, JSON Lines needs the fields `names`, and a table exactly these columns in
    this order. A table's first row is its header if a column is chosen by name, or if its cells are single
    words and the last is not a value. Raises ConfigError for any row that does not fit.
    """
    if file.columns and len(file.columns) != len(names):
        raise task_error(file.spec, f"name {len(names)} columns after #: {','.join(names)}")
    is_json = file.suffix == ".jsonl"
    columns = file.columns or (tuple(names) if is_json else ())
    rows = []
    with explained(f"cannot evaluate {file.spec}"):
        for where, found in table_rows(file.spec, file.path, columns):
            if len(found) != len(names):
                expected = f"expected {len(names)} columns ({', '.join(names)}), found {len(found)}"
                raise source_error(where, f"{expected}; fix the row, or choose columns with #")
            *fields, last_field = columns or names
            *texts, last = found
            cells = [checked_text(where, field, text) for field, text in zip(fields, texts, strict=True)]
            cells.append(_value_text(where, last_field, last))
            rows.append(Row(where, tuple(cell.strip() for cell in cells)))
    may_have_header = not is_json and all(map(is_index, columns))
    if rows and may_have_header and _is_header(rows[0].cells, is_value):
        del rows[0]
    if not rows:
        raise task_error(file.spec, "the file has no rows; give another file")
    for row in rows:
        for name, cell in zip(names[:-1], row.cells[:-1], strict=True):
            if not cell:
                raise task_error(row.where, f"the {name} is empty; fix or remove the row")
    return rows


def _value_text(where: str, field: str, value: object) -> str:
    """A score or a label as a table would write it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return checked_text(where, field, value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)


def _is_header(cells: Sequence[str], is_value: Callable[[str], bool]) -> bool:
    return not is_value(cells[-1]) and all(_HEADER_CELL.fullmatch(cell) for cell in cells)
