"""Every row of the table names modules that a model of its family has."""

from __future__ import annotations

from typing import Any

import pytest

from ffsplit.models.detection import architecture_of
from ffsplit.models.experts import expert_matrices
from ffsplit.models.ffns import ffns_of
from tests.tiny_families import FAMILIES, make_model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def test_the_row_finds_the_modules(model: Any) -> None:
    prefix, ffns = ffns_of(model)
    assert prefix == ""
    assert {ffn.tower for ffn in ffns} == set(architecture_of(model).towers)
    for ffn in ffns:
        if ffn.expert is not None:
            down = expert_matrices(model.get_submodule(ffn.runner), ffn.paths, ffn.expert).down
            assert tuple(down.shape) == (ffn.shape.hidden_size, ffn.shape.num_neurons)
            continue
        block = model.get_submodule(ffn.block)
        down = block.get_submodule(ffn.paths.down).weight
        sizes = (ffn.shape.hidden_size, ffn.shape.num_neurons)
        assert tuple(down.T.shape if ffn.paths.transposed else down.shape) == sizes
        if ffn.paths.activation is not None:
            assert callable(block.get_submodule(ffn.paths.activation))


def test_the_guard_is_an_original_tensor_below_the_split(model: Any) -> None:
    names = model.state_dict()
    for ffn in ffns_of(model)[1]:
        assert ffn.guard.startswith(f"{ffn.split_path}.")
        assert names[ffn.guard].dim() == (2 if ffn.expert is None else 3)


def test_ffns_are_numbered_and_named_apart(model: Any) -> None:
    ffns = ffns_of(model)[1]
    assert [ffn.index for ffn in ffns] == list(range(len(ffns)))
    assert len({ffn.name for ffn in ffns}) == len(ffns)
    assert all(ffns[ffn.unit].unit == ffn.unit <= ffn.index for ffn in ffns)
