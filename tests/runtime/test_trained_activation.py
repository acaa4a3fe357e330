"""A trained activation keeps its parameters, whatever becomes of the matrices around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffsplit
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.ffn_tensors import load_activation, load_ffn
from tests.small_jobs import SmallJob
from tests.tiny_families import outputs, save_checkpoint

ALPHA = "model.layers.1.mlp.act_fn.alpha_p"


@pytest.fixture
def apertus(tmp_path: Path) -> Path:
    """Its layers have other parameters than an activation begins with, and than each other."""
    directory = save_checkpoint(tmp_path / "model", "apertus", "ForCausalLM")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors |= {
        name: torch.full_like(tensors[name], 1.5 + int(name.split(".")[2]))
        for name in tensors
        if "alpha" in name
    }
    save_file(tensors, path, {"format": "pt"})
    return directory


def test_an_ffn_has_its_own_parameters(apertus: Path) -> None:
    checkpoint = open_checkpoint(apertus)
    model = load_whole_model(apertus, checkpoint.class_name)
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for layer, ffn in enumerate(checkpoint.ffns):
        activation = load_activation(checkpoint, ffn.index, device=x_TD.device)
        weights = load_ffn(checkpoint, ffn.index, activation=activation, device=x_TD.device)
        torch.testing.assert_close(weights(x_TD), model.model.layers[layer].mlp(x_TD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        "{kind: prune}, {kind: quantize}",
        "{kind: low_rank, whiten: true}",
        "{kind: prune, compensation: least_squares}, {kind: distill, num_steps: 2}",
    ],
)
def test_every_form_of_result_keeps_them(apertus: Path, tmp_path: Path, step: str) -> None:
    job = SmallJob(tmp_path, apertus)
    recipe = job.recipe(step=step, heavy_share=0.5 if "low_rank" in step else 1)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=8, keep=0.9))
    (weights,) = (tmp_path / "out").glob("*/*/model.safetensors")
    assert torch.equal(load_file(weights)[ALPHA], load_file(apertus / "model.safetensors")[ALPHA])
    loaded, dense = (
        ffsplit.load(str(tmp_path / "out")),
        load_whole_model(apertus, manifest.model.architecture),
    )
    assert float(loaded.state_dict()[ALPHA]) == 2.5
    assert sum("act_fn.alpha_p" in name for name in loaded.state_dict()) == 2
    change = (outputs(loaded) - outputs(dense)).norm() / outputs(dense).norm()
    assert change < 0.4
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        outputs(load_whole_model(tmp_path / "again", manifest.model.architecture)), outputs(loaded)
    )


def test_a_parameter_for_each_neuron_is_refused(apertus: Path) -> None:
    path = apertus / "model.safetensors"
    save_file(load_file(path) | {ALPHA: torch.zeros(32)}, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"has 32 elements, and .* only if all neurons share"):
        open_checkpoint(apertus)


def test_healing_trains_the_model_around_them(apertus: Path, tmp_path: Path) -> None:
    """Then int8 weights follow, which need the activation once more."""
    job = SmallJob(tmp_path, apertus)
    healing = "healing: {epochs: 1, batch_rows: 8, learning_rate: 0.001, evaluations: 1}"
    recipe = job.recipe(more=f"{healing}\nafter_healing: {{kind: quantize, method: gptq}}")
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=16))
    assert all(layer.layout.parts[0].up.format == "integer" for layer in manifest.layers)
    loaded = ffsplit.load(str(tmp_path / "out"))
    assert outputs(loaded).isfinite().all()
    assert sum("act_fn.alpha_p" in name for name in loaded.state_dict()) == 2
