"""FFNs that are alike stand once in a config, and every tower that can be loaded alone has a guard."""

from __future__ import annotations

import pytest

from ffsplit.errors import ArtifactError
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.models.find import ffns_of
from ffsplit.runtime.checkpoint_format import FORMAT_VERSION, guarded, runs_of
from ffsplit.runtime.plugin import SplitConfig
from tests.tiny_families import make_model

SHAPE = FFNShape(num_neurons=8, hidden_size=4, gated=False, up_bias=True, down_bias=True)


def test_runs_keep_number_and_order() -> None:
    wide, narrow = LayerLayout.dense(SHAPE), LayerLayout.dense(SHAPE, 4)
    layouts = [wide, wide, narrow, wide]
    runs = runs_of(layouts, [SHAPE] * 4)
    assert [(run.count, run.layout) for run in runs] == [(2, wide), (1, narrow), (1, wide)]


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("llama", ["layers.0"]),
        ("mixtral", ["layers.0"]),
        ("qwen2_moe", ["layers.0"]),
        ("t5", ["encoder.block.0", "decoder.block.0"]),
        ("clip", ["text_model.encoder.layers.0", "vision_model.encoder.layers.0"]),
    ],
)
def test_the_first_ffn_of_each_tower_is_guarded(family: str, blocks: list[str]) -> None:
    ffns = ffns_of(make_model(family))[1]
    chosen = sorted(guarded(ffns))
    assert [ffns[index].block for index in chosen] == blocks
    assert all(ffns[index].unit == index for index in chosen)


@pytest.mark.parametrize(
    ("version", "message"),
    [(FORMAT_VERSION - 1, "older.*compress the original again"), (FORMAT_VERSION + 1, "newer.*upgrade")],
)
def test_another_format_is_refused(version: int, message: str) -> None:
    """Before its scales, say, are read as numbers of another type."""
    with pytest.raises(ArtifactError, match=message):
        SplitConfig(version, layers=[], shapes=[])
