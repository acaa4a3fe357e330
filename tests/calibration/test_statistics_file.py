"""Statistics survive Parquet to the last bit, and the file says what it holds and nothing of its making."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import COLUMNS, read_statistics, write_statistics
from ffsplit.errors import CalibrationError
from tests.calibration.random_statistics import assert_identical, random_statistics

LINEAGE = {"model": "ab" * 32, "text": "cd" * 32, "calibration": "0123456789abcdef"}


def layers() -> tuple[NeuronStats, ...]:
    """Layers of different widths and tokens, with the floats that are hardest to keep."""
    odd = random_statistics(3, num_neurons=4)
    odd.sum[:] = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308]
    return random_statistics(1, num_neurons=12), random_statistics(2, num_neurons=30), odd


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "statistics.parquet"
    write_statistics(path, layers(), lineage=LINEAGE)
    return path


def test_reading_gives_back_the_same_bits(written: Path) -> None:
    read = read_statistics(written)
    assert len(read) == 3
    for first, second in zip(layers(), read, strict=True):
        assert_identical(first, second)


def test_a_single_layer_and_a_single_neuron(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    write_statistics(path, [random_statistics(1, num_neurons=1)], lineage={})
    (read,) = read_statistics(path)
    assert_identical(read, random_statistics(1, num_neurons=1))


def test_the_bytes_depend_on_the_statistics_alone(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "other-name.parquet"
    again.parent.mkdir()
    write_statistics(again, layers(), lineage=dict(reversed(LINEAGE.items())))
    assert again.read_bytes() == written.read_bytes()
    write_statistics(again, layers(), lineage=LINEAGE | {"text": "other"})
    assert again.read_bytes() != written.read_bytes()


def test_the_file_carries_version_units_and_lineage(written: Path) -> None:
    schema = pq.read_schema(written)
    assert schema.names == list(COLUMNS)
    assert schema.metadata[b"ffsplit.schema_version"] == b"1"
    assert json.loads(schema.metadata[b"ffsplit.lineage"]) == LINEAGE
    for name, (type, unit) in COLUMNS.items():
        assert schema.field(name).type == type
        assert schema.field(name).metadata == {b"unit": unit.encode()}


def test_the_file_says_nothing_of_time_host_or_user(written: Path) -> None:
    metadata = pq.read_schema(written).metadata
    assert set(metadata) == {b"ffsplit.schema_version", b"ffsplit.lineage"}
    data = written.read_bytes()
    assert socket.gethostname().encode() not in data
    assert str(written.parent).encode() not in data
    assert len(getpass.getuser()) < 5 or getpass.getuser().encode() not in data


def test_one_row_a_neuron(written: Path) -> None:
    table = pq.read_table(written).to_pydict()
    assert table["layer"] == [0] * 12 + [1] * 30 + [2] * 4
    assert table["neuron"] == [*range(12), *range(30), *range(4)]
    tokens = [stats.num_tokens for stats in layers()]
    assert table["num_tokens"] == list(np.repeat(tokens, [12, 30, 4]))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_an_error(written: Path, fraction: float) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(CalibrationError, match=r"statistics\.parquet") as caught:
        read_statistics(written)
    assert "\n" not in str(caught.value)


def test_a_damaged_page_is_an_error_or_changes_nothing(written: Path) -> None:
    data = bytearray(written.read_bytes())
    data[200:260] = bytes(60)
    written.write_bytes(data)
    with pytest.raises(CalibrationError):
        read_statistics(written)


def test_another_table_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"layer": [0]}), tmp_path / "other.parquet")
    for name in ("other.parquet", "absent.parquet"):
        with pytest.raises(CalibrationError, match=name):
            read_statistics(tmp_path / name)


def test_statistics_without_rows_are_an_error(tmp_path: Path) -> None:
    empty = pa.table({name: pa.array([], type) for name, (type, _) in COLUMNS.items()})
    pq.write_table(empty.replace_schema_metadata({"ffsplit.schema_version": "1"}), tmp_path / "empty.parquet")
    with pytest.raises(CalibrationError, match="it has no rows"):
        read_statistics(tmp_path / "empty.parquet")


def test_a_column_that_was_added_later_is_ignored(written: Path) -> None:
    table = pq.read_table(written)
    later = table.append_column("kurtosis", pa.array([3.0] * table.num_rows))
    expected = read_statistics(written)
    pq.write_table(later, written)
    for ours, theirs in zip(read_statistics(written), expected, strict=True):
        assert ours.num_tokens == theirs.num_tokens and (ours.sum_abs == theirs.sum_abs).all()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2", "statistics of schema 2; this version of ffsplit reads 1: upgrade ffsplit"),
        ("one", "no neuron statistics: it has no ffsplit.schema_version"),
        (None, "no neuron statistics: it has no ffsplit.schema_version"),
    ],
)
def test_another_version_is_refused(written: Path, version: str | None, said: str) -> None:
    metadata = {} if version is None else {"ffsplit.schema_version": version}
    pq.write_table(pq.read_table(written).replace_schema_metadata(metadata), written)
    with pytest.raises(CalibrationError, match=said):
        read_statistics(written)
