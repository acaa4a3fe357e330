"""Which engines a width suits, by the multiples that they state."""

from __future__ import annotations

import pytest

from ffsplit.ffn.engines import Suits, suited
from ffsplit.ffn.shapes import FFNShape, LayerLayout, LowRank, PartLayout

SHAPE = FFNShape(num_neurons=4096, hidden_size=512, gated=True, up_bias=False, down_bias=False)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (2048, Suits(True, (1, 2, 4), True)),
        (512, Suits(True, (1, 2, 4), True)),
        (768, Suits(True, (1, 2), True)),
        (640, Suits(True, (1,), False)),
        (704, Suits(True, (), False)),
        (176, Suits(True, (), False)),
        (536, Suits(False, (), False)),
        (542, Suits(False, (), False)),
    ],
)
def test_a_width_suits_engines_whose_multiple_it_is(width: int, expected: Suits) -> None:
    assert suited([LayerLayout.dense(SHAPE, width)]) == expected


def test_all_layers_parts_and_ranks_count() -> None:
    wide, narrow = LayerLayout.dense(SHAPE, 2048), LayerLayout.dense(SHAPE, 1664)
    assert suited([wide, narrow]) == suited([narrow]) == Suits(True, (1,), False)
    assert suited([wide, LayerLayout.dropped()]) == suited([wide])
    for rank, is_whole in ((64, True), (40, False)):
        light = PartLayout(num_neurons=2048, up=LowRank(rank=rank), down=LowRank(rank=rank))
        split = wide.model_copy(update={"light": light})
        assert suited([split]) == Suits(is_whole, (1, 2, 4), True)
