"""A model of which one block at a time is loaded gives the bytes of the whole one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffsplit.calibration.hooks import Sampling, observe
from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.errors import ConfigError
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_base_model, load_whole_model
from ffsplit.models.streamed import StreamedModel, _each_tensor, spilled
from tests.conftest import CheckpointFactory
from tests.tiny_families import FAMILIES, save_checkpoint, usual_head
from tests.tiny_models import random_rows

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
ROWS = {name: ARCHITECTURES.get(family.model_type or name) for name, family in FAMILIES.items()}
STREAMED = [name for name, row in ROWS.items() if row is not None and row.can_stream()]
STREAMED += ["gemma3", "glm", "deepseek_v3", "nemotron_h", "llava"]
BATCHES = list(padded_batches(random_rows(9), batch_tokens=60, pad_id=0))


def streamed(directory: Path, *, dtype: torch.dtype = torch.float32, whole: bool = False) -> StreamedModel:
    checkpoint = open_checkpoint(directory)
    class_name = checkpoint.class_name if whole else None
    return StreamedModel(checkpoint, device=CPU, dtype=dtype, class_name=class_name)


def base_model_of(directory: Path) -> Any:
    return load_base_model(open_checkpoint(directory), device=CPU, dtype=torch.float32)


def run_through(model: StreamedModel, batches: Sequence[Batch]) -> list[Any]:
    model.start([batch.arguments for batch in batches])
    for layer in range(len(model.blocks)):
        with model.block(layer):
            for index in range(len(batches)):
                model.advance(index)
    return [model.finish(index)[0] for index in range(len(batches))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headed", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_outputs_are_the_whole_models(
    checkpoint_of: CheckpointFactory, family: str, headed: bool, dtype: torch.dtype
) -> None:
    head = "" if not headed else "ForMaskedLM" if family == "bert" else "ForCausalLM"
    check_outputs(checkpoint_of(family, head=head, dtype=torch.bfloat16), dtype=dtype)


@pytest.mark.parametrize("family", STREAMED)
def test_every_family_that_is_said_to_goes_block_by_block(tmp_path: Path, family: str) -> None:
    check_outputs(save_checkpoint(tmp_path, family, usual_head(family)))


@torch.no_grad()
def check_outputs(directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
    whole = load_whole_model(directory, open_checkpoint(directory).class_name, dtype=dtype)
    expected = [whole(**batch.arguments)[0] for batch in BATCHES]
    got = run_through(streamed(directory, dtype=dtype, whole=True), BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def same(a: NeuronStats | None, b: NeuronStats | None) -> bool:
    assert a is not None and b is not None
    fields = ("sum_abs", "sum", "sum_squares", "max_abs", "num_active", "down_norm")
    return a.num_tokens == b.num_tokens and all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in fields
    )


@pytest.mark.parametrize("inputs_only", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_statistics_and_inputs_are_the_whole_models(
    checkpoint_of: CheckpointFactory, family: str, inputs_only: bool
) -> None:
    directory = checkpoint_of(family, max_shard_size="30KB")
    ffns = open_checkpoint(directory).ffns
    num_tokens = sum(batch.num_tokens for batch in BATCHES)
    chosen = torch.tensor([0, 3, 7, 61])  # the last batches have none
    sampling = Sampling(lambda _: chosen, {"attention_mask": num_tokens})
    whole, blocks = (
        list(observe(model, ffns, BATCHES, sampling=sampling, inputs_only=inputs_only))
        for model in (
            load_base_model(open_checkpoint(directory), device=CPU, dtype=torch.float32),
            streamed(directory),
        )
    )
    assert len(whole) == len(blocks) == 3
    for a, b in zip(whole, blocks, strict=True):
        assert a.inputs is not None and b.inputs is not None and len(a.inputs["input"]) == 4
        assert torch.equal(a.inputs["input"], b.inputs["input"])
        assert a.statistics is b.statistics is None if inputs_only else same(a.statistics, b.statistics)


def test_one_block_at_a_time_is_loaded(checkpoint_of: CheckpointFactory) -> None:
    model = streamed(checkpoint_of("llama"))
    model.start([BATCHES[0].arguments])
    for layer in range(len(model.blocks)):
        with model.block(layer):
            loaded = [not any(p.is_meta for p in block.parameters()) for block in model.blocks]
            assert loaded == [index == layer for index in range(len(model.blocks))]
            model.advance(0)
    assert all(p.is_meta for block in model.blocks for p in block.parameters())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_a_spilled_tensor_is_the_same(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).transpose(1, 2).to(dtype)
    assert torch.equal(spilled(tensor), tensor)
    assert spilled(tensor[:0]).shape == (0, 4, 3)


def without(directory: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint that lacks a tensor."""
    shutil.copytree(directory, target)
    tensors: dict[str, Tensor] = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj.weight", "embed_tokens.weight", "norm.weight"])
def test_a_tensor_that_is_missing_is_named(
    checkpoint_of: CheckpointFactory, tmp_path: Path, name: str
) -> None:
    directory = without(checkpoint_of("llama"), tmp_path / "model", name)
    with pytest.raises(ConfigError, match=f"holds no tensor for {name}"):
        run_through(streamed(directory), BATCHES)


def test_every_tensor_in_what_a_block_gives_is_changed() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    found = _each_tensor({"states": one, "cache": (two, [one, None]), "name": "x"}, lambda tensor: tensor + 1)
    assert isinstance(found["cache"], tuple) and isinstance(found["cache"][1], list)
    assert found["states"].tolist() == found["cache"][1][0].tolist() == [2, 2]
    assert found["cache"][0].tolist() == [1, 1, 1]
    assert (found["cache"][1][1], found["name"]) == (None, "x")
