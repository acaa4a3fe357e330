"""Two parts of one format are one in a checkpoint, and the same function."""

from __future__ import annotations

import pytest
import torch

from ffsplit.compressors.base import LayerContext
from ffsplit.compressors.quantize import QuantizeCompressor
from ffsplit.ffn.shapes import FFNShape, Integer, LayerLayout, PartLayout
from tests.compressors.random_ffn import FORMS, random_ffn, random_inputs


@pytest.mark.parametrize(
    "quantize", [None, {"num_bits": 4, "group_size": 8}, {"num_bits": 8, "group_size": 16}]
)
@pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
def test_parts_of_one_format_fold_into_one(shape: FFNShape, quantize: dict[str, int] | None) -> None:
    dense = random_ffn(shape)
    split = dense.split(torch.arange(0, 32))
    if quantize is not None:
        context = LayerContext(dense, random_inputs(16), None)
        layout = QuantizeCompressor(**quantize).plan(split.layout, shape=shape, budget=10**9)
        split = QuantizeCompressor(**quantize).compress(split, layout=layout, context=context)
    folded, x = split.folded(), random_inputs(16)[0]
    assert folded.layout == split.layout.folded and len(folded.parts) == 1
    torch.testing.assert_close(folded(x), split(x), atol=1e-4, rtol=1e-4)


def test_parts_that_cannot_stand_side_by_side_stay_apart() -> None:
    """Two formats; one scale a row, which is another in each part; a group that would reach into both."""
    part = PartLayout(num_neurons=24, up=Integer(num_bits=8), down=Integer(num_bits=8))
    in_groups = part.model_copy(update=dict.fromkeys(("up", "down"), Integer(num_bits=4, group_size=16)))
    for heavy, light in ((part, in_groups), (part, part), (in_groups, in_groups)):
        layout = LayerLayout(heavy=heavy, light=light, down_bias=True)
        assert not layout.can_fold and layout.folded == layout
