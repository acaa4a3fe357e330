"""Runs that keep every neuron: heavy hitters in int8, the rest in int4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ffsplit
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import Integer
from ffsplit.recipes.recipe import load_recipe, parse_recipe
from ffsplit.runtime.quantized_linear import QuantizedLinear
from tests.conftest import CheckpointFactory
from tests.small_jobs import PRUNE, SmallJob

SPLIT = "after_healing: {kind: quantize, num_bits: 4, group_size: 16, method: gptq, heavy_fraction: 0.25}"
LIGHT, HEAVY = Integer(num_bits=4, group_size=16), Integer(num_bits=8)
IDS = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(4))


def job_of(folder: Path, checkpoint_of: CheckpointFactory, family: str) -> SmallJob:
    head = {"llama": {"head": "ForCausalLM"}}.get(family, {})
    return SmallJob(folder, checkpoint_of(family, **head))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_neuron_is_kept_in_few_bits(
    family: str, tmp_path: Path, checkpoint_of: CheckpointFactory
) -> None:
    job = job_of(tmp_path, checkpoint_of, family)
    config = job.config(tmp_path / "out", recipe=job.recipe(step=PRUNE, more=SPLIT), keep=1)
    manifest = ffsplit.compress(config)
    assert [stage.name for stage in manifest.stages] == ["calibrate", "compress", "quantize", "measure"]
    num_neurons, num_heavy = {"llama": (64, 16), "bert": (96, 16)}[family]
    for layer in manifest.layers:
        heavy, light = layer.layout.heavy, layer.layout.light
        assert heavy is not None and light is not None
        assert (heavy.num_neurons, light.num_neurons) == (num_heavy, num_neurons - num_heavy)
        assert set(heavy.formats) == {HEAVY} and set(light.formats) == {LIGHT}
        assert layer.num_heavy_hitters == num_heavy
    measured = manifest.measurements
    assert measured is not None and not manifest.plain
    assert measured.compressed_size.ffn_elements == measured.original_size.ffn_elements
    assert measured.compressed_size.ffn_bytes == sum(layer.size_bytes for layer in manifest.layers)
    fidelity = measured.fidelity
    if family == "bert":
        assert fidelity["token_cosine"] > 0.99
    model = ffsplit.load(str(tmp_path / "out"))
    bits = [each.num_bits for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert sorted(set(bits)) == [4, 8] and bits.count(4) == bits.count(8) == 2 * 3
    with torch.no_grad():
        expected = model(IDS)[0]
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(type(model).from_pretrained(tmp_path / "again")(IDS)[0], expected)


def test_a_narrowed_model_is_sampled_again(tmp_path: Path, checkpoint_of: CheckpointFactory) -> None:
    """What its FFNs see is not what the original's saw."""
    job = job_of(tmp_path, checkpoint_of, "llama")
    config = job.config(tmp_path / "out", recipe=job.recipe(step=PRUNE, more=SPLIT), keep=0.5)
    manifest = ffsplit.compress(config)
    stages = [stage.name for stage in manifest.stages]
    assert stages == ["calibrate", "compress", "sample", "quantize", "measure"]
    (layout,) = {layer.layout for layer in manifest.layers}
    assert layout.heavy is not None and layout.light is not None
    assert (layout.heavy.num_neurons, layout.light.num_neurons) == (7, 24)
    with torch.no_grad():
        assert bool(ffsplit.load(str(tmp_path / "out"))(IDS)[0].isfinite().all())


def test_the_shipped_recipe() -> None:
    recipe = load_recipe("split")
    assert recipe.keep == 1 and recipe.healing is None and recipe.linears == "kept"
    assert recipe.steps == load_recipe("refit").steps
    assert recipe.calibration == load_recipe("refit").calibration
    last = recipe.after_healing
    assert last is not None and last.method == "gptq" and last.heavy_fraction > 0


def test_healing_leaves_the_rounding_to_gptq() -> None:
    recipe = load_recipe("tiny")
    assert recipe.healed_for == recipe.after_healing is not None
    gptq = recipe.model_copy(update={"after_healing": load_recipe("split").after_healing})
    assert gptq.healed_for is None


@pytest.mark.parametrize("options", ["num_bits: 8", "num_bits: 4, parts: light"])
def test_heavy_hitters_have_more_bits_than_the_rest(options: str) -> None:
    text = f"name: x\ndescription: y\nheavy_share: 1\nsteps: [{PRUNE}]\n"
    with pytest.raises(ConfigError, match="heavy_fraction gives some neurons 8 bits"):
        parse_recipe(
            f"{text}after_healing: {{kind: quantize, heavy_fraction: 0.1, {options}}}", where="a recipe"
        )
