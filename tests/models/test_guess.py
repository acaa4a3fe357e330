"""Families without a row are tried by structure, and taken only where an exact split changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

import ffsplit
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.family import Architecture
from ffsplit.models.guess import row_by_structure
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.trial import check_by_trial
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_families import outputs
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
    said = f"warning: {family} is not in docs/models.md: its FFNs are guessed (experimental)"
    assert said in capsys.readouterr().err
    found = outputs(ffsplit.load(str(tmp_path / "out")))
    dense = outputs(load_whole_model(source, checkpoint.class_name))
    assert found.isfinite().all() and (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("block_by_block", [False, True])
@pytest.mark.parametrize("prefix", UNKNOWN)
def test_a_guess_that_is_true_passes_its_trial(tmp_path: Path, prefix: str, block_by_block: bool) -> None:
    checkpoint = open_checkpoint(save(tmp_path, prefix, **UNKNOWN[prefix]))
    check_by_trial(checkpoint, block_by_block=block_by_block)


@pytest.mark.parametrize("block_by_block", [False, True])
def test_a_wrong_guess_is_refused_by_trial(tmp_path: Path, block_by_block: bool) -> None:
    """A gate and an up projection that are taken for each other."""
    checkpoint = open_checkpoint(save(tmp_path, "Granite", **UNKNOWN["Granite"]))
    for ffn in checkpoint.ffns:
        up, gate = ffn.up, ffn.gate
        object.__setattr__(ffn, "up", gate)
        object.__setattr__(ffn, "gate", up)
    with pytest.raises(UnsupportedModelError, match="changes the model's outputs"):
        check_by_trial(checkpoint, block_by_block=block_by_block)


@pytest.mark.parametrize("block_by_block", [False, True])
def test_whatever_a_model_on_trial_raises_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_by_block: bool
) -> None:
    checkpoint = open_checkpoint(save(tmp_path, "Granite", **UNKNOWN["Granite"]))

    def forward(*_: Any, **__: Any) -> None:
        raise NotImplementedError("this family wants\nsomething else")

    monkeypatch.setattr(transformers.GraniteModel, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"a trial .* failed: this family wants$") as caught:
        check_by_trial(checkpoint, block_by_block=block_by_block)
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
    """Linears around an activation, below a module of their own or in the block itself."""

    def __init__(self, *, gated: bool, parent: bool) -> None:
        super().__init__()
        owner = nn.Module() if parent else self
        owner.up, owner.down = nn.Linear(16, 40), nn.Linear(40, 16)
        if gated:
            owner.gate = nn.Linear(16, 40)
        owner.act = nn.GELU()
        if parent:
            self.mlp = owner


def row_of(block: Block, **config: Any) -> Architecture:
    model = nn.Module()
    model.base_model_prefix, model.layers = "", nn.ModuleList([block])
    return row_by_structure(model, config={"model_type": "toy", **config})


def test_a_gated_ffn_is_found_only_in_a_module_of_its_own() -> None:
    row = row_of(Block(gated=True, parent=True), hidden_act="gelu")
    assert row.towers[0].ffns[0].gate == "mlp.gate"
    assert row_of(Block(gated=False, parent=False), hidden_act="gelu").towers[0].ffns[0].up == "up"
    with pytest.raises(UnsupportedModelError, match=r"structure shows no FFN.*gate \[40, 16\]"):
        row_of(Block(gated=True, parent=False), hidden_act="gelu")


def test_an_activation_that_the_config_does_not_name_is_not_guessed() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"mlp\.up and mlp\.down look like an FFN.*no known activation"
    ):
        row_of(Block(gated=False, parent=True), hidden_act="made-up")
