"""FFNs that are alike stand once in a config, and every tower that can be loaded alone has a guard."""

from __future__ import annotations

from typing import Any

import pytest

from ffsplit.errors import ArtifactError
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.models.ffns import ffns_of
from ffsplit.runtime.ffn_tensors import FORMAT_VERSION, guarded, runs_of
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


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1.0", None])
def test_another_format_is_refused(version: Any) -> None:
    """Before its scales, say, are read as numbers of another type."""
    with pytest.raises(ArtifactError, match=rf"has checkpoint format {version!r}.* reads 1: upgrade ffsplit"):
        SplitConfig(version, ffns=[])


def test_a_field_that_was_added_later_is_ignored_beside_the_ffns_and_refused_in_them() -> None:
    """What says how a tensor is stored must not be overlooked."""
    ffns = [run.model_dump(mode="json") for run in runs_of([LayerLayout.dense(SHAPE)], [SHAPE])]
    config = SplitConfig(FORMAT_VERSION, ffns=ffns, made_by="a later version")
    assert [run.count for run in config.runs] == [1] and "made_by" not in config.to_dict()
    later = SplitConfig(FORMAT_VERSION, ffns=[ffns[0] | {"rotated": True}])
    with pytest.raises(
        ArtifactError, match=r"^config\.json, quantization_config: ffns\.rotated: Extra input"
    ):
        _ = later.runs
