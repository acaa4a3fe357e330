"""Families without a row are found by structure, and taken only where an exact split changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

import ffsplit
from ffsplit.errors import UnsupportedModelError
from ffsplit.ffn.activations import ACTIVATIONS
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.detection import row_by_structure
from ffsplit.models.family import Architecture
from ffsplit.models.load import load_whole_model
from ffsplit.runtime import trial
from ffsplit.runtime.trial import check_by_trial
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_families import outputs, save_checkpoint, usual_head
from tests.tiny_models import VOCAB_SIZE, randomize, save_tokenizer

_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}
_SPREAD = {"vocab_size": VOCAB_SIZE, "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 40}
UNKNOWN = {
    "Granite": _SIZES | {"num_key_value_heads": 1},
    "Olmo2": _SIZES | {"num_key_value_heads": 1},
    "XGLM": _SPREAD | {"max_position_embeddings": 64, "pad_token_id": 0},
}
"""XGLM's linears and activation lie in the block itself, in no module of their own."""


IDS = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def save(directory: Path, prefix: str, **config: Any) -> Path:
    chosen = getattr(transformers, f"{prefix}ForCausalLM")
    model = chosen(chosen.config_class(**config))
    randomize(model, seed=0)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.mark.matrix()
@pytest.mark.parametrize("prefix", UNKNOWN)
@pytest.mark.parametrize("step", ["{kind: prune}", LOW_RANK])
def test_a_family_without_a_row_is_found_and_compressed(
    tmp_path: Path, prefix: str, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "model", prefix, **UNKNOWN[prefix])
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture.model_type not in ARCHITECTURES and checkpoint.is_guessed
    assert [shape.num_neurons for shape in checkpoint.shapes] == [40, 40]
    assert checkpoint.shapes[0].gated == (prefix != "XGLM")
    assert (checkpoint.ffns[0].paths.module is None) == (prefix == "XGLM")
    job = SmallJob(tmp_path, source)
    share = 1.0 if "prune" in step else 0.5
    recipe = job.recipe(step=step, heavy_share=share)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=8))
    assert manifest.plain == ("prune" in step)
    family = checkpoint.architecture.model_type
    said = f"{family}: its FFNs are found by structure (docs/models.md says how that was tested)"
    assert said in capsys.readouterr().err
    found = outputs(ffsplit.load(str(tmp_path / "out")))
    dense = outputs(load_whole_model(source, checkpoint.class_name))
    assert found.isfinite().all() and (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("block_by_block", [False, True])
@pytest.mark.parametrize("prefix", UNKNOWN)
def test_what_was_found_passes_its_trial(tmp_path: Path, prefix: str, block_by_block: bool) -> None:
    checkpoint = open_checkpoint(save(tmp_path, prefix, **UNKNOWN[prefix]))
    difference = check_by_trial(checkpoint, ROWS, block_by_block=block_by_block)
    assert 0 < difference <= 1e-5, "halves are added in another order"


def times_nan(x: torch.Tensor) -> torch.Tensor:
    return x * torch.nan


@pytest.mark.parametrize("block_by_block", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, times_nan])
@pytest.mark.parametrize("family", ["qwen3", "esm"])
def test_another_activation_fails_its_trial(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    activation: Callable[[torch.Tensor], torch.Tensor],
    block_by_block: bool,
) -> None:
    """No FFN of ESM can be split: its own outputs are compared."""
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, family, usual_head(family)))
    assert check_by_trial(checkpoint, ROWS, block_by_block=block_by_block) <= 1e-5
    monkeypatch.setattr(trial, "load_activation", lambda *_, **__: activation)
    with pytest.raises(UnsupportedModelError, match="changes the model's outputs"):
        check_by_trial(checkpoint, ROWS, block_by_block=block_by_block)


def test_infinities_that_do_not_change_are_no_difference() -> None:
    """A mask that is added to scores holds some."""
    expected = torch.tensor([2.0, -torch.inf])
    assert trial._relative(expected.clone(), expected) == 0
    assert trial._relative(torch.tensor([1.0, -torch.inf]), expected) == 0.5
    assert trial._relative(torch.tensor([2.0, 0.0]), expected) == torch.inf
    assert trial._relative(torch.empty(0), torch.empty(0)) == 0


@pytest.mark.parametrize("block_by_block", [False, True])
def test_what_was_found_wrongly_is_refused_by_trial(tmp_path: Path, block_by_block: bool) -> None:
    """A gate and an up projection that are taken for each other."""
    checkpoint = open_checkpoint(save(tmp_path, "Granite", **UNKNOWN["Granite"]))
    for ffn in checkpoint.ffns:
        up, gate = ffn.up, ffn.gate
        object.__setattr__(ffn, "up", gate)
        object.__setattr__(ffn, "gate", up)
    with pytest.raises(UnsupportedModelError, match="changes the model's outputs"):
        check_by_trial(checkpoint, ROWS, block_by_block=block_by_block)


@pytest.mark.parametrize("block_by_block", [False, True])
def test_whatever_a_model_on_trial_raises_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_by_block: bool
) -> None:
    checkpoint = open_checkpoint(save(tmp_path, "Granite", **UNKNOWN["Granite"]))

    def forward(self: Any, input_ids: Any = None, **_: Any) -> None:
        raise NotImplementedError("this family wants\nsomething else")

    monkeypatch.setattr(transformers.GraniteModel, "forward", forward)
    with pytest.raises(
        UnsupportedModelError,
        match=r"a trial .* failed: this family wants; it was given input_ids, attention_mask: ",
    ) as caught:
        check_by_trial(checkpoint, ROWS, block_by_block=block_by_block)
    assert isinstance(caught.value.__cause__, NotImplementedError)


def test_what_was_found_is_listed(tmp_path: Path) -> None:
    config = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    directory = save(tmp_path, "Mamba", **config, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"mamba is not in the table.*MambaBlock.*mixer\.in_proj"):
        open_checkpoint(directory)


def test_a_family_that_transformers_does_not_know_lists_the_table(tmp_path: Path) -> None:
    directory = save(tmp_path, "Granite", **UNKNOWN["Granite"])
    text = (directory / "config.json").read_text().replace('"granite"', '"made-up"')
    (directory / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"'made-up' is not supported \(known: bart, bert"):
        open_checkpoint(directory)


class Block(nn.Module):
    """Linear maps around an activation, in a module of their own or in the block itself."""

    def __init__(self, *names: str, width: int = 40, parent: str = "", activation: str = "gelu") -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        owner: nn.Module = self
        for part in parent.split(".") if parent else ():
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        for name in names:
            sizes = (width, 16) if "down" in name else (16, 2 * width if "fused" in name else width)
            owner.add_module(name, nn.Linear(*sizes))
        owner.add_module("act", ACT2FN[activation])


def row_of(*blocks: nn.Module, **config: Any) -> Architecture:
    model = nn.Module()
    model.base_model_prefix, model.layers = "", nn.ModuleList(blocks)
    return row_by_structure(model, config={"model_type": "toy", **config})


def paths_of(*blocks: nn.Module) -> list[tuple[str, str | None, str, bool, str | None]]:
    (tower,) = row_of(*blocks).towers
    return [(ffn.up, ffn.gate, ffn.down, ffn.fused, ffn.module) for ffn in tower.ffns]


def test_two_or_three_maps_around_an_activation_are_an_ffn() -> None:
    assert paths_of(Block("up", "down")) == [("up", None, "down", False, None)]
    assert paths_of(Block("up", "down", parent="mlp")) == [("mlp.up", None, "mlp.down", False, "mlp")]
    gated = Block("gate", "up", "down", parent="mlp")
    assert paths_of(gated) == [("mlp.up", "mlp.gate", "mlp.down", False, "mlp")]
    fused = Block("fused", "down", parent="mlp")
    assert paths_of(fused) == [("mlp.fused", None, "mlp.down", True, "mlp")]


def test_the_ffns_of_all_blocks_are_found_not_those_of_the_first() -> None:
    last = Block("up", "down", parent="moe.shared_expert")
    found = paths_of(Block("up", "down", parent="mlp"), Block(), last)
    assert found == [
        ("mlp.up", None, "mlp.down", False, "mlp"),
        ("moe.shared_expert.up", None, "moe.shared_expert.down", False, "moe.shared_expert"),
    ]


def test_two_ffns_side_by_side_are_told_by_their_names() -> None:
    """As in the blocks of BLIP's query transformer."""
    block = Block("up_query", "up", "down_query", "down")
    assert paths_of(block) == [
        ("up_query", None, "down_query", False, None),
        ("up", None, "down", False, None),
    ]


def test_lists_within_lists_and_towers_beside_each_other() -> None:
    """As Swin keeps its stages, and BART its encoder and decoder."""
    stages = nn.ModuleList(nn.ModuleList([Block("up", "down")]) for _ in range(2))

    class Pair(nn.Module):
        base_model_prefix, main_input_name = "", "input_ids"

        def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> None: ...

    model = Pair()
    model.encoder, model.decoder = nn.Module(), nn.Module()
    model.encoder.stages, model.decoder.layers = stages, nn.ModuleList([Block("up", "down", width=24)])
    row = row_by_structure(model, config={"model_type": "toy", "is_encoder_decoder": True})
    assert row.makes == "target"
    assert [(tower.blocks, tower.name, tower.mask) for tower in row.towers] == [
        ("encoder.stages.*.*", "encoder", "attention_mask"),
        ("decoder.layers.*", "decoder", "decoder_attention_mask"),
    ]


def test_blocks_may_share_one_activation() -> None:
    """Flaubert's do: it has one name among a model's modules."""
    first, second = Block("up", "down"), Block("up", "down")
    second.act = first.act
    assert paths_of(first, second) == [("up", None, "down", False, None)]
    assert all(ffn.activation == "act" for ffn in row_of(first, second).towers[0].ffns)


def test_an_encoder_of_patches_is_a_tower_like_another() -> None:
    """DepthPro's, beside its encoder of the whole picture. Maps that embed or merge patches are no FFN."""
    model = nn.Module()
    model.base_model_prefix = ""
    for name in ("patch_encoder", "patch_merging", "image_encoder"):
        model.add_module(name, nn.Module())
        model.get_submodule(name).layers = nn.ModuleList([Block("up", "down")])
    row = row_by_structure(model, config={"model_type": "toy"})
    assert [tower.blocks for tower in row.towers] == ["patch_encoder.layers.*", "image_encoder.layers.*"]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_activation_is_told_by_its_module(activation: str) -> None:
    row = row_of(Block("up", "down", activation=activation), hidden_act="tanh")
    assert ACTIVATIONS[row.towers[0].default_activation] is ACTIVATIONS[activation]


def test_what_has_the_shape_of_an_ffn_and_is_part_of_none_is_refused() -> None:
    """Compressing the rest would be called the whole."""
    block = Block("up", "down", parent="mlp")
    block.more = nn.Linear(16, 64)
    with pytest.raises(UnsupportedModelError, match=r"may belong to an FFN.*: layers\.\*\.more \[64, 16\]"):
        row_of(block)
    stacked = Block("up", "down", parent="mlp")
    stacked.mlp.weights = nn.Parameter(torch.zeros(4, 16, 40))
    with pytest.raises(UnsupportedModelError, match=r"layers\.\*\.mlp\.weights \[4, 16, 40\]"):
        row_of(stacked)
    normalised = Block("up", "down", parent="mlp")
    normalised.mlp.norm = nn.LayerNorm(40)
    with pytest.raises(
        UnsupportedModelError, match=r"a norm over its FFNs. neurons \(layers\.\*\.mlp\.norm\)"
    ):
        row_of(normalised)


def test_a_block_without_an_ffn_that_is_known_is_looked_at_too() -> None:
    """A list whose other blocks have one, and a list of its own."""
    strange = Block()
    strange.wide, strange.wider = nn.Linear(16, 48), nn.Linear(48, 96)
    with pytest.raises(UnsupportedModelError, match=r"layers\.\*\.wide \[48, 16\]"):
        row_of(Block("up", "down", parent="mlp"), strange)


def test_what_is_named_for_another_purpose_is_no_part_of_an_ffn() -> None:
    block = Block("up", "down", parent="mlp")
    block.adapter = nn.Linear(16, 64)
    block.router = nn.Linear(16, 4)
    assert len(paths_of(block)) == 1


def test_a_model_without_linear_ffns_lists_what_it_has() -> None:
    found = r"shows no FFN.*layers\.\* of Block: attention\.out_proj"
    with pytest.raises(UnsupportedModelError, match=found):
        row_of(Block())
