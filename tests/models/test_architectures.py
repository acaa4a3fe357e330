"""Every row of the table names modules that a model of its family has."""

from __future__ import annotations

import pytest
from torch import nn

from ffsplit.models.architectures import ARCHITECTURES
from tests.tiny_models import CAUSAL, ENCODERS, FAMILIES, NUM_LAYERS, make_model


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_finds_the_modules(family: str) -> None:
    model, row = make_model(family), ARCHITECTURES[family]
    blocks = model.get_submodule(row.blocks)
    assert isinstance(blocks, nn.ModuleList) and len(blocks) == NUM_LAYERS
    width = getattr(model.config, row.width_field)
    assert isinstance(getattr(model.config, row.activation_field), str)
    for block in blocks:
        up, down = block.get_submodule(row.up), block.get_submodule(row.down)
        assert up.weight.shape == (width, 32) and down.weight.shape == (32, width)
        if row.gate is not None:
            assert block.get_submodule(row.gate).weight.shape == up.weight.shape
        if row.activation is not None:
            block_activation = block
            for name in row.activation.split("."):
                block_activation = getattr(block_activation, name)
            assert callable(block_activation)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guard_is_an_original_tensor_below_the_split(family: str) -> None:
    row = ARCHITECTURES[family]
    names = make_model(family).state_dict()
    for layer in range(NUM_LAYERS):
        guard = f"{row.blocks}.{layer}.{row.split_path}.{row.guard}"
        assert names[guard].dim() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kind(family: str) -> None:
    kind = ARCHITECTURES[family].kind
    assert (kind == "encoder") == (family in ENCODERS) and (kind == "causal_lm") == (family in CAUSAL)
