"""Layouts cost what they say, survive JSON, and refuse what they do not know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.ffn.shapes import Dense, FFNShape, LayerLayout, LowRank, PartLayout

shapes = st.builds(
    FFNShape,
    num_neurons=st.integers(2, 200),
    hidden_size=st.integers(1, 100),
    gated=st.booleans(),
    up_bias=st.booleans(),
    down_bias=st.booleans(),
)
BERT_BASE = FFNShape(num_neurons=3072, hidden_size=768, gated=False, up_bias=True, down_bias=True)
LLAMA_7B = FFNShape(num_neurons=11008, hidden_size=4096, gated=True, up_bias=False, down_bias=False)


def test_the_elements_of_known_ffns() -> None:
    assert BERT_BASE.num_elements == 2 * 3072 * 768 + 3072 + 768
    assert LLAMA_7B.num_elements == 3 * 11008 * 4096
    assert (BERT_BASE.elements_per_neuron, LLAMA_7B.elements_per_neuron) == (2 * 768 + 1, 3 * 4096)


@given(shape=shapes)
def test_an_ffn_is_its_neurons_and_the_output_bias(shape: FFNShape) -> None:
    d, n = shape.hidden_size, shape.num_neurons
    inputs = 2 if shape.gated else 1
    expected = inputs * n * d + d * n + inputs * n * shape.up_bias + d * shape.down_bias
    assert shape.num_elements == LayerLayout.dense(shape).num_elements(shape) == expected


@given(shape=shapes, data=st.data())
def test_a_dense_split_costs_what_the_dense_ffn_does(shape: FFNShape, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, shape.num_neurons - 1))
    layout = LayerLayout(
        heavy=PartLayout.dense(shape, width),
        light=PartLayout.dense(shape, shape.num_neurons - width),
        down_bias=shape.down_bias,
    )
    assert layout.num_elements(shape) == shape.num_elements
    assert layout.size_bytes(shape, 4) == 4 * shape.num_elements
    assert layout.num_neurons == shape.num_neurons
    assert not layout.is_dense and LayerLayout.dense(shape, width).is_dense
    narrow = LayerLayout.dense(shape, width).num_elements(shape)
    assert narrow == width * shape.elements_per_neuron + shape.hidden_size * shape.down_bias


def test_formats() -> None:
    assert Dense().num_elements(10, 4) == 40 and Dense().size_bytes(10, 4, 2) == 80
    assert LowRank(rank=3).num_elements(10, 4) == 42 and LowRank(rank=3).size_bytes(10, 4, 4) == 168


def test_low_rank_parts_are_not_dense() -> None:
    part = PartLayout(num_neurons=10, up=Dense(), down=LowRank(rank=2))
    assert not part.is_dense
    assert not LayerLayout(heavy=part, light=None, down_bias=True).is_dense


@given(shape=shapes, rank=st.integers(1, 9))
def test_layouts_survive_json(shape: FFNShape, rank: int) -> None:
    format = LowRank(rank=rank)
    light = PartLayout(num_neurons=1, up=format, gate=format if shape.gated else None, down=format)
    for heavy in (None, PartLayout.dense(shape, 1)):
        layout = LayerLayout(heavy=heavy, light=light, down_bias=shape.down_bias)
        assert LayerLayout.model_validate_json(layout.model_dump_json()) == layout
        assert LayerLayout.model_validate(layout.model_dump(mode="json")) == layout
    assert FFNShape.model_validate_json(shape.model_dump_json()) == shape


@pytest.mark.parametrize(
    "fields",
    [
        {"num_neurons": 0},
        {"num_neurons": 4, "up": {"format": "int3"}},
        {"num_neurons": 4, "up": {"format": "low_rank"}},
        {"num_neurons": 4, "up": {"format": "low_rank", "rank": 0}},
        {"num_neurons": 4, "sideways": {"format": "dense"}},
    ],
)
def test_unknown_layouts_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PartLayout.model_validate(fields)
