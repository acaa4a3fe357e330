"""Neuron statistics as Parquet: one row per neuron, units and lineage in the metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.errors import CalibrationError, explained

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
WEIGHTED_NORM = "sum_weighted_norm"
"""The other such column."""
_NO_EXPERT = -1


def statistics_bytes(layers: Sequence[NeuronStats], *, lineage: Mapping[str, str]) -> bytes:
    """The bytes of the file that `write_statistics` writes."""
    buffer = io.BytesIO()
    write_statistics(buffer, layers, lineage=lineage)
    return buffer.getvalue()


def write_statistics(
    path: Path | io.BytesIO, layers: Sequence[NeuronStats], *, lineage: Mapping[str, str]
) -> None:
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
        table = _with_experts(table, layers)
    pq.write_table(table, path, compression="zstd")


def _with_experts(table: pa.Table, layers: Sequence[NeuronStats]) -> pa.Table:
    """The table with the columns of experts, which have one value for all neurons of an FFN."""
    counts = [stats.num_neurons for stats in layers]
    numbers = [_NO_EXPERT if stats.expert is None else stats.expert for stats in layers]
    norms = [np.nan if stats.sum_weighted_norm is None else stats.sum_weighted_norm for stats in layers]
    for name, type, values, unit in (
        (EXPERT, pa.int32(), numbers, f"index of the expert in its block, from 0; {_NO_EXPERT}: no expert"),
        (
            WEIGHTED_NORM,
            pa.float64(),
            norms,
            "sum over the expert's tokens of the router's weight times the L2 norm of its output; "
            "NaN: no expert",
        ),
    ):
        rows = np.repeat(np.asarray(values, dtype=type.to_pandas_dtype()), counts)
        table = table.append_column(pa.field(name, type, metadata={"unit": unit}), [rows])
    return table


def read_statistics(path: Path) -> tuple[NeuronStats, ...]:
    """The statistics of every layer, in order.

    Raises CalibrationError when the file is not such a table, or one of another schema.
    """
    with explained(f"{path} holds no neuron statistics", kind=CalibrationError):
        table = pq.read_table(path)
        _check_version(path, table.schema.metadata or {})
        names = [*COLUMNS, *(name for name in (EXPERT, WEIGHTED_NORM) if name in table.column_names)]
        values = {name: table.column(name).to_numpy() for name in names}
    if table.num_rows == 0:
        raise CalibrationError(f"{path} holds no neuron statistics: it has no rows")
    boundaries = np.flatnonzero(np.diff(values["layer"])) + 1
    layers = []
    for rows in np.split(np.arange(len(values["layer"])), boundaries):
        part = {name: column[rows] for name, column in values.items()}
        expert = int(part[EXPERT][0]) if EXPERT in part else _NO_EXPERT
        norm = float(part[WEIGHTED_NORM][0]) if WEIGHTED_NORM in part else np.nan
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
                sum_weighted_norm=None if np.isnan(norm) else norm,
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
