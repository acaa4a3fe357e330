"""Latency tables rise with the width, and are refused where they do not hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.errors import ConfigError
from ffsplit.ffn import FFNShape, ModelShape
from ffsplit.splitting.latency import LatencyPoint, LatencyTable, read_latency_table

SHAPE = FFNShape(num_neurons=96, hidden_size=32, gated=False, up_bias=True, down_bias=True)
MODEL = ModelShape(
    shapes=(SHAPE,) * 2, itemsize=4, num_parameters=50_000, num_parameters_without_embeddings=40_000
)
HARDWARE: dict[str, str | int] = {"processor": "a", "num_cpus": 2, "torch": "2.0", "device": "cpu"}


def table(*times: float) -> LatencyTable:
    points = tuple(LatencyPoint(width=8 * (i + 1), ms=ms) for i, ms in enumerate(times))
    return LatencyTable(
        model="m",
        model_shape=MODEL,
        batch_size=1,
        num_tokens=8,
        dtype="float32",
        num_threads=1,
        hardware=HARDWARE,
        points=points,
    )


def test_times_between_points_lie_on_a_line_and_are_constant_beyond() -> None:
    rising = table(1, 2, 4)
    assert [rising.ms(width) for width in (8, 16, 24)] == [1, 2, 4]
    assert rising.ms(20) == 3
    assert (rising.ms(1), rising.ms(1000)) == (1, 4)


def test_neighbours_out_of_order_share_their_mean() -> None:
    assert [table(1, 5, 3, 6).ms(width) for width in (8, 16, 24, 32)] == [1, 4, 4, 6]
    assert {table(3, 2, 1).ms(width) for width in range(30)} == {2}


@given(times=st.lists(st.floats(0.1, 100), min_size=2, max_size=12))
def test_never_faster_with_more_neurons(times: list[float]) -> None:
    found = [table(*times).ms(width) for width in range(1, 8 * len(times) + 9)]
    assert all(a <= b + 1e-9 for a, b in pairwise(found))
    assert min(times) - 1e-9 <= found[0] and found[-1] <= max(times) + 1e-9


def test_widths_rise() -> None:
    points = (LatencyPoint(width=8, ms=1), LatencyPoint(width=8, ms=1))
    with pytest.raises(ValidationError, match="widths must rise"):
        LatencyTable.model_validate(table(1, 2).model_dump() | {"points": points})


def test_a_table_of_this_machine_and_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(table(1, 2).model_dump_json())
    path = str(tmp_path / "t.json")
    assert read_latency_table(path, model=MODEL, hardware=HARDWARE, dtype="float32") == table(1, 2)
    with pytest.raises(ConfigError, match="measured in float32, the run computes in bfloat16"):
        read_latency_table(path, model=MODEL, hardware=HARDWARE, dtype="bfloat16")


@pytest.mark.parametrize("name", HARDWARE)
def test_a_table_from_another_machine_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(table(1, 2).model_dump_json())
    with pytest.raises(ConfigError, match=f"another machine \\({name} ") as caught:
        read_latency_table(str(path), model=MODEL, hardware=HARDWARE | {name: "other"}, dtype="float32")
    assert "\n" not in str(caught.value) and "measure one here" in str(caught.value)


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(table(1, 2).model_dump_json())
    with pytest.raises(ConfigError, match="another model, m"):
        other = MODEL.model_copy(update={"num_parameters": 1})
        read_latency_table(str(path), model=other, hardware=HARDWARE, dtype="float32")


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", "\x00"])
def test_what_is_no_table_is_one_line(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="--latency-table") as caught:
        read_latency_table(str(path), model=MODEL, hardware=HARDWARE, dtype="float32")
    assert "\n" not in str(caught.value)
