"""Statistics of each neuron: sums and counts over tokens, which can be merged; and their Parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ffsplit.errors import CalibrationError, explained

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class NeuronStats:
    """Statistics of the N neurons of one FFN, over `num_tokens` tokens that are not padding.

    a_n is a neuron's activation, the input of the down projection. `num_active` counts tokens with
    a_n > 0. `down_norm` is |W_down[:, n]|, the same in every shard.
    """

    num_tokens: int
    sum_abs: Floats
    sum: Floats
    sum_squares: Floats
    max_abs: Floats
    num_active: Ints
    down_norm: Floats
    expert: int | None = None
    """Which of its block's experts it is; None for an FFN that sees every token."""

    @property
    def num_neurons(self) -> int:
        return len(self.sum)

    def merge(self, other: NeuronStats) -> NeuronStats:
        """The statistics over the tokens of both. Raises CalibrationError when the models differ."""
        if not np.array_equal(self.down_norm, other.down_norm):
            raise CalibrationError("statistics of different weights cannot be merged")
        return NeuronStats(
            num_tokens=self.num_tokens + other.num_tokens,
            sum_abs=self.sum_abs + other.sum_abs,
            sum=self.sum + other.sum,
            sum_squares=self.sum_squares + other.sum_squares,
            max_abs=np.maximum(self.max_abs, other.max_abs),
            num_active=self.num_active + other.num_active,
            down_norm=self.down_norm,
            expert=self.expert,
        )


def experts_together(statistics: Sequence[NeuronStats]) -> list[list[int]]:
    """The indices of the FFNs in lists: one per FFN, and one for all experts of a block."""
    groups: list[list[int]] = []
    for index, stats in enumerate(statistics):
        if stats.expert:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def merge_layers(a: tuple[NeuronStats, ...], b: tuple[NeuronStats, ...]) -> tuple[NeuronStats, ...]:
    """Merge the statistics of two shards, layer by layer."""
    return tuple(first.merge(second) for first, second in zip(a, b, strict=True))


def reduce_tree(items: Iterable[T], merge: Callable[[T, T], T]) -> T:
    """Merge items along a tree fixed by their number, holding at most log2 of that number at a time.

    Works like a binary counter: two results of 2^k items each are merged as soon as both exist,
    so floating-point sums do not depend on who computed an item, or when.
    """
    pending: list[tuple[int, T]] = []
    for item in items:
        level, result = 0, item
        while pending and pending[-1][0] == level:
            result = merge(pending.pop()[1], result)
            level += 1
        pending.append((level, result))
    if not pending:
        raise CalibrationError("there are no statistics to reduce")
    _, result = pending.pop()
    while pending:
        result = merge(pending.pop()[1], result)
    return result


SCHEMA_VERSION = 1
"""Columns may be added under one number; a reader takes those that it knows."""
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "layer": (pa.int32(), "index of the layer, from 0"),
    "neuron": (pa.int32(), "index of the neuron in its layer, from 0"),
    "num_tokens": (pa.int64(), "tokens observed, padding left out"),
    "sum_abs": (pa.float64(), "sum over tokens of |a|"),
    "sum": (pa.float64(), "sum over tokens of a"),
    "sum_squares": (pa.float64(), "sum over tokens of a^2"),
    "max_abs": (pa.float64(), "largest |a|"),
    "num_active": (pa.int64(), "tokens with a > 0"),
    "down_norm": (pa.float64(), "L2 norm of the neuron's column of the down projection"),
}

EXPERT = "expert"
"""A column that only models with experts have: in these files each expert is a `layer`."""
_NO_EXPERT = -1


def write_statistics(path: Path, layers: Sequence[NeuronStats], *, lineage: Mapping[str, str]) -> None:
    """Write the statistics of all layers as one file, whose bytes depend on its arguments alone."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for index, stats in enumerate(layers):
        n = stats.num_neurons
        columns["layer"].append(np.full(n, index, dtype=np.int32))
        columns["neuron"].append(np.arange(n, dtype=np.int32))
        columns["num_tokens"].append(np.full(n, stats.num_tokens, dtype=np.int64))
        for name in ("sum_abs", "sum", "sum_squares", "max_abs", "num_active", "down_norm"):
            columns[name].append(getattr(stats, name))
    fields = [pa.field(name, type, metadata={"unit": unit}) for name, (type, unit) in COLUMNS.items()]
    metadata = {
        "ffsplit.schema_version": str(SCHEMA_VERSION),
        "ffsplit.lineage": json.dumps(dict(lineage), sort_keys=True),
    }
    schema = pa.schema(fields, metadata=metadata)
    table = pa.table([np.concatenate(columns[name]) for name in COLUMNS], schema=schema)
    if any(stats.expert is not None for stats in layers):
        numbers = [_NO_EXPERT if stats.expert is None else stats.expert for stats in layers]
        rows = [
            np.full(stats.num_neurons, n, dtype=np.int32) for stats, n in zip(layers, numbers, strict=True)
        ]
        unit = {"unit": f"index of the expert in its block, from 0; {_NO_EXPERT}: no expert"}
        table = table.append_column(pa.field(EXPERT, pa.int32(), metadata=unit), [np.concatenate(rows)])
    pq.write_table(table, path, compression="zstd")


def read_statistics(path: Path) -> tuple[NeuronStats, ...]:
    """The statistics of every layer, in order.

    Raises CalibrationError when the file is not such a table, or one of another schema.
    """
    with explained(f"{path} holds no neuron statistics", kind=CalibrationError):
        table = pq.read_table(path)
        _check_version(path, table.schema.metadata or {})
        names = [*COLUMNS, *([EXPERT] if EXPERT in table.column_names else [])]
        values = {name: table.column(name).to_numpy() for name in names}
    if table.num_rows == 0:
        raise CalibrationError(f"{path} holds no neuron statistics: it has no rows")
    boundaries = np.flatnonzero(np.diff(values["layer"])) + 1
    layers = []
    for rows in np.split(np.arange(len(values["layer"])), boundaries):
        part = {name: column[rows] for name, column in values.items()}
        expert = int(part[EXPERT][0]) if EXPERT in part else _NO_EXPERT
        layers.append(
            NeuronStats(
                num_tokens=int(part["num_tokens"][0]),
                sum_abs=part["sum_abs"],
                sum=part["sum"],
                sum_squares=part["sum_squares"],
                max_abs=part["max_abs"],
                num_active=part["num_active"],
                down_norm=part["down_norm"],
                expert=None if expert == _NO_EXPERT else expert,
            )
        )
    return tuple(layers)


def _check_version(path: Path, metadata: Mapping[bytes, bytes]) -> None:
    version = metadata.get(b"ffsplit.schema_version", b"").decode("ascii", "replace")
    if not version.isdecimal():
        raise CalibrationError(f"{path} holds no neuron statistics: it has no ffsplit.schema_version")
    if int(version) != SCHEMA_VERSION:
        raise CalibrationError(
            f"{path} has statistics of schema {version}; this version of ffsplit reads {SCHEMA_VERSION}: "
            "upgrade ffsplit"
        )
