"""FFNs whose neurons are channels of a depthwise convolution or a batch norm: they are dropped whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ffsplit
from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.measurement.latency import example_inputs
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.trial import check_by_trial
from tests.small_jobs import PRUNE, SmallJob
from tests.tiny_families import outputs, save_checkpoint
from tests.tiny_rows import calibration

FAMILIES = {"segformer": "dwconv", "levit": "batch_norm"}
"""What lies between the up projection and the activation."""


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", request.param, "ForImageClassification")


def test_half_of_the_channels_is_the_dense_model_without_the_others(source: Path, tmp_path: Path) -> None:
    job = SmallJob(tmp_path, source)
    rows = (calibration(open_checkpoint(source), tmp_path),)
    recipe = job.recipe(step="{kind: prune}")
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=16, calibration=rows))
    checkpoint = open_checkpoint(source)
    narrowed = ffsplit.load(str(tmp_path / "out"))
    dense = load_whole_model(source, manifest.model.architecture)
    assert all(name in narrowed.state_dict() for name in dense.state_dict())
    kept = 0
    with torch.no_grad():
        for ffn in checkpoint.ffns:
            kept += _drop_what_is_missing(dense, narrowed, ffn, prefix=checkpoint.prefix)
    torch.testing.assert_close(outputs(narrowed), outputs(dense), rtol=1e-4, atol=1e-5)
    assert kept == sum(layer.layout.num_neurons for layer in manifest.layers)
    assert all(layer.relative_error is None for layer in manifest.layers)


def _drop_what_is_missing(dense: nn.Module, narrowed: nn.Module, ffn: FFNPlace, *, prefix: str) -> int:
    """Zero the columns of a dense down projection that a narrower one lacks. Returns how many it has."""
    path = f"{prefix}{ffn.block}.{ffn.paths.down}"
    wide, narrow = (model.get_submodule(path).weight for model in (dense, narrowed))
    keeps = torch.tensor([any(torch.equal(column, each) for each in narrow.T) for column in wide.T])
    wide[:, ~keeps] = 0
    assert keeps.sum() == narrow.shape[1] < wide.shape[1]
    return int(keeps.sum())


def test_a_neurons_own_elements_are_counted(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    first, tensors = checkpoint.ffns[0], load_file(source / "model.safetensors")
    sizes = [tensors[name].numel() for name in first.tensor_names]
    assert sum(sizes) == first.shape.num_elements
    assert first.shape.per_neuron == (10 if "segformer" in str(checkpoint.config["model_type"]) else 4)


@pytest.mark.parametrize("step", [PRUNE, "{kind: low_rank}", "{kind: quantize}"])
def test_what_fits_an_ffn_to_its_inputs_is_refused(source: Path, tmp_path: Path, step: str) -> None:
    """A convolution reads the positions around a token too."""
    job = SmallJob(tmp_path, source)
    rows = (calibration(open_checkpoint(source), tmp_path),)
    config = job.config(tmp_path / "out", recipe=job.recipe(step=step), calibration=rows)
    wanted = r"a convolution or a batch norm between .* only be dropped, not fitted: use norm-prune$"
    with pytest.raises(ConfigError, match=wanted):
        ffsplit.compress(config)
    assert not (tmp_path / "out").exists()


def test_the_trial_exchanges_neurons(source: Path) -> None:
    """Where something else depends on their order, they are no neurons of an FFN."""
    checkpoint = open_checkpoint(source)
    inputs = example_inputs(load_whole_model(source, checkpoint.class_name), num_rows=2, num_tokens=1)
    assert 0 < check_by_trial(checkpoint, inputs, block_by_block=False) <= 1e-5
    for ffn in checkpoint.ffns:
        wrong = ffn.paths.model_copy(update={"per_neuron": (ffn.paths.down,)})
        object.__setattr__(ffn, "paths", wrong)
    with pytest.raises(UnsupportedModelError, match="changes the model's outputs"):
        check_by_trial(checkpoint, inputs, block_by_block=False)
