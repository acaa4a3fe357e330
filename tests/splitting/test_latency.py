"""Latency tables rise with the width, and are refused where they do not hold."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.compressors import PruneCompressor
from ffsplit.config import Budget
from ffsplit.errors import BudgetError, ConfigError
from ffsplit.ffn.shapes import FFNShape, ModelShape
from ffsplit.splitting.latency import LatencyPoint, LatencyTable, read_latency_table
from ffsplit.splitting.layer import HeavyRule
from ffsplit.splitting.solver import Solver

SHAPE = FFNShape(num_neurons=16, hidden_size=32, gated=False, up_bias=True, down_bias=True)


def model_shape(num_neurons: int, num_layers: int = 2) -> ModelShape:
    shape = SHAPE.model_copy(update={"num_neurons": num_neurons})
    elements = num_layers * shape.num_elements
    return ModelShape(
        shapes=(shape,) * num_layers,
        itemsize=4,
        num_parameters=elements + 9_000,
        num_parameters_without_embeddings=elements + 3_000,
    )


MODEL = model_shape(16)
HARDWARE: dict[str, str | int] = {"processor": "a", "num_cpus": 2, "torch": "2.0", "device": "cpu"}


def table(*times: float, num_layers: int = 2) -> LatencyTable:
    points = tuple(LatencyPoint(width=8 * (i + 1), ms=ms) for i, ms in enumerate(times))
    return LatencyTable(
        model="m",
        model_shape=model_shape(8 * len(times), num_layers),
        batch_size=1,
        num_tokens=8,
        dtype="float32",
        num_threads=1,
        hardware=HARDWARE,
        points=points,
    )


def test_times_between_points_lie_on_a_line_and_are_constant_below() -> None:
    rising = table(1, 2, 4)
    assert [rising.ms(width) for width in (8, 16, 24)] == [1, 2, 4]
    assert rising.ms(20) == 3
    assert rising.ms(1) == 1
    with pytest.raises(AssertionError, match="wider"):
        rising.ms(25)


def test_neighbours_out_of_order_share_their_mean() -> None:
    assert [table(1, 5, 3, 6).ms(width) for width in (8, 16, 24, 32)] == [1, 4, 4, 6]
    assert {table(3, 2, 1).ms(width) for width in range(25)} == {2}


@given(times=st.lists(st.floats(0.1, 100), min_size=2, max_size=12))
def test_never_faster_with_more_neurons(times: list[float]) -> None:
    fitted = table(*times)
    found = [fitted.ms(width) for width in range(1, 8 * len(times) + 1)]
    assert all(a <= b for a, b in pairwise(found))
    assert min(times) - 1e-9 <= found[0] and found[-1] <= max(times) + 1e-9


@given(times=st.lists(st.floats(0.1, 100), min_size=2, max_size=12))
def test_the_fit_is_the_least_squares_one(times: list[float]) -> None:
    """What no monotone sequence is nearer to: the mean of every pool, by scipy's own."""
    pytest.importorskip("scipy", minversion="1.12")
    from scipy.optimize import isotonic_regression

    fitted = table(*times)
    expected = isotonic_regression(times).x.tolist()
    assert [fitted.ms(8 * (i + 1)) for i in range(len(times))] == pytest.approx(expected)


@given(
    times=st.lists(st.floats(0.1, 100), min_size=2, max_size=6),
    num_layers=st.integers(1, 31),
    share=st.floats(0, 1),
)
def test_what_is_refused_agrees_with_the_table(times: list[float], num_layers: int, share: float) -> None:
    """The smallest named is met, what is given as its time is met at every width, and no more is taken."""
    fitted = table(*times, num_layers=num_layers)
    solver = Solver(
        model=fitted.model_shape,
        heavy=HeavyRule(by="share", value=1),
        steps=(PruneCompressor(),),
        latency=fitted,
    )

    def width_within(limit: float) -> int:
        (width,) = {each.num_neurons for each in solver.solve(Budget(kind="max_latency_ms", limit=limit))}
        return width

    dense = 8 * len(times)
    least, most = fitted.ms(1), fitted.ms(dense)
    with pytest.raises(BudgetError, match="narrower than 8 neurons were not timed") as caught:
        solver.solve(Budget(kind="max_latency_ms", limit=0.99 * least))
    found = re.search(r"smallest is ([\d.]+)$", str(caught.value))
    assert found is not None and least <= float(found[1]) <= least + 0.0011
    assert fitted.ms(width_within(float(found[1]))) <= float(found[1])
    assert width_within(most) == dense
    limit = least + share * (most - least)
    width = width_within(limit)
    assert fitted.ms(width) <= limit
    assert width == dense or fitted.ms(min(dense, width // 8 * 8 + 8)) > limit


@pytest.mark.parametrize("width", [80, 104])
def test_a_table_reaches_to_the_models_own_width(width: int, tmp_path: Path) -> None:
    """Beyond its last point it would call FFNs as quick as narrower ones."""
    fields = table(*range(1, 13)).model_dump()
    points = [*fields["points"][:9], {"width": width, "ms": 20}]
    (tmp_path / "t.json").write_text(json.dumps(fields | {"points": points}))
    with pytest.raises(
        ConfigError, match=f"widest FFN timed has {width} neurons, the model's has 96"
    ) as caught:
        read_latency_table(
            str(tmp_path / "t.json"), model=model_shape(96), hardware=HARDWARE, dtype="float32"
        )
    assert "Value error" not in str(caught.value) and "measure one here" in str(caught.value)


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
