"""Runs that heal what they have compressed, and then quantize it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ffsplit
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.run import pipeline
from ffsplit.run.job import prepare
from ffsplit.runtime.attention_int8 import attention_linears
from tests.conftest import CheckpointFactory
from tests.small_jobs import LOW_RANK, SmallJob, digests

WEIGHTS = ("*.safetensors", "stats/*.parquet", "config.json")


HEALING = "healing: {epochs: 10, batch_rows: 8, learning_rate: 0.002, evaluations: 1, checkpoint_minutes: 0}"
SHORT = HEALING.replace("epochs: 10", "epochs: 3")


@pytest.mark.slow
@pytest.mark.subprocess
def test_healing_and_quantization_end_a_run(small_job: SmallJob, tmp_path: Path) -> None:
    def run(name: str, more: str) -> ffsplit.Manifest:
        recipe = small_job.recipe(step="{kind: prune}", more=more)
        return ffsplit.compress(small_job.config(tmp_path / name, recipe=recipe, keep=0.3))

    plain, healed = run("plain", ""), run("healed", HEALING)
    tiny = run("tiny", f"{HEALING}\nafter_healing: {{kind: quantize, num_bits: 8}}")
    assert healed.plain and not tiny.plain
    assert [stage.name for stage in tiny.stages] == ["calibrate", "compress", "heal", "quantize", "measure"]
    assert plain.measurements and healed.measurements and tiny.measurements
    before, after = plain.measurements, healed.measurements
    assert after.compressed_size == before.compressed_size
    assert after.fidelity["token_cosine"] > before.fidelity["token_cosine"]
    assert tiny.measurements.fidelity["token_cosine"] > before.fidelity["token_cosine"]
    assert tiny.measurements.compressed_size.ffn_elements == before.compressed_size.ffn_elements
    assert tiny.measurements.compressed_size.ffn_bytes < 0.4 * before.compressed_size.ffn_bytes
    code = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(attempt_of(tmp_path / "tiny"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


@pytest.mark.matrix(dtype=(torch.bfloat16,))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_healed_is_what_is_published(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The integers of FFNs and attention are those that healing has judged, to the bit, in every dtype."""
    model = shutil.copytree(small_job.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    # small weights, so that scales are below what float16 holds
    tensors = {name: (0.01 * t if "dense.weight" in name else t).to(dtype) for name, t in tensors.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    healed: dict[str, Tensor] = {}

    def replace_weights(directory: Path, weights: Path) -> None:
        healed.update(load_file(weights))
        in_place(directory, weights)

    in_place = pipeline.replace_weights
    monkeypatch.setattr(pipeline, "replace_weights", replace_weights)
    ends = "after_healing: {kind: quantize, num_bits: 8}\nlinears: int8"
    recipe = small_job.recipe(step="{kind: prune}", more=f"{HEALING.replace('10', '2')}\n{ends}")
    fields = {"recipe": recipe, "keep": 0.3, "model": str(model)}
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", **fields))
    (config,) = (tmp_path / "out").glob("*/*/config.json")
    published = load_whole_model(config.parent, manifest.model.architecture)
    checkpoint = open_checkpoint(model)
    base = published.base_model
    assert manifest.linears is not None
    assert manifest.linears.original_size_bytes == dtype.itemsize * manifest.linears.num_elements
    for path in attention_linears(checkpoint):
        found = base.get_submodule(path).float_weight(torch.float32)
        assert torch.equal(healed[f"{checkpoint.prefix}{path}.weight"], found), path
    for ffn in checkpoint.ffns:
        part = base.get_submodule(f"{ffn.split_prefix}").heavy
        for place, linear in ((ffn.up, part.up), (ffn.down, part.down)):
            assert torch.equal(healed[place.name], linear.float_weight(torch.float32)), place.name
    floats = {t.dtype for t in load_file(config.parent / "model.safetensors").values()} - {torch.uint8}
    assert floats == {dtype}


def test_the_number_of_healing_workers_is_part_of_a_run_that_heals(
    small_job: SmallJob, tmp_path: Path
) -> None:
    """And of no other: one process gives the bytes of as many as it stands in for, so it stays in the key."""
    healing, plain = small_job.recipe(more=HEALING), small_job.recipe()

    def key(recipe: str, **fields: Any) -> str:
        config = small_job.config(tmp_path, recipe=recipe, healing_threads=1, **fields)
        return prepare(config).keys.run

    assert key(healing) == key(healing, healing_workers=1) != key(healing, healing_workers=2)
    assert key(healing, healing_workers=2) == key(healing, healing_workers=2, workers=3, runner="ray")
    assert key(plain) == key(plain, healing_workers=2)
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", recipe=healing, healing_workers=2))
    assert manifest.compute.healing_workers == 2


def attempt_of(out: Path) -> Path:
    (manifest,) = out.glob("*/*/manifest.json")
    return manifest.parent


def test_healing_resumes_to_the_same_bytes(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_job.recipe(more=SHORT)
    ffsplit.compress(small_job.config(tmp_path / "undisturbed", recipe=recipe))

    def stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    from ffsplit.run.stages import heal

    save = heal._checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(heal, "_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe))
    ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe))
    assert digests(tmp_path / "out", *WEIGHTS) == digests(tmp_path / "undisturbed", *WEIGHTS)


def test_healing_what_is_not_an_ordinary_model_is_refused(small_job: SmallJob, tmp_path: Path) -> None:
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK, more=HEALING)
    with pytest.raises(ConfigError, match="prune or distill"):
        ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe))
    assert not (tmp_path / "out").exists()


OLD_NAMES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


@pytest.mark.matrix()
@pytest.mark.parametrize("head", ["ForMaskedLM", ""])
@pytest.mark.parametrize(
    "more", [SHORT, f"{SHORT}\nafter_healing: {{kind: quantize, num_bits: 8}}\nlinears: int8"]
)
def test_names_of_older_code_change_nothing_but_names(
    checkpoint_of: CheckpointFactory, tmp_path: Path, head: str, more: str
) -> None:
    """bert-base-uncased is published with LayerNorm.gamma and LayerNorm.beta."""
    modern = checkpoint_of("bert", head=head)
    legacy = Path(shutil.copytree(modern, tmp_path / "legacy"))
    before = load_file(modern / "model.safetensors")
    save_file(
        {old(name): tensor for name, tensor in before.items()}, legacy / "model.safetensors", {"format": "pt"}
    )
    found = []
    for name, model in (("new", modern), ("old", legacy)):
        (tmp_path / name).mkdir()
        job = SmallJob(tmp_path / name, model)
        recipe = job.recipe(step="{kind: prune}, {kind: distill, num_steps: 40}", more=more)
        ffsplit.compress(job.config(tmp_path / name / "out", recipe=recipe, healing_threads=1))
        (weights,) = (tmp_path / name / "out").glob("*/*/model.safetensors")
        found.append(load_file(weights))
    new, legacy_names = found
    assert {old(name) for name in new} == set(legacy_names)
    assert all(torch.equal(tensor, legacy_names[old(name)]) for name, tensor in new.items())
    trained = [name for name in new if "LayerNorm" in name and name in before and "embeddings" not in name]
    changed = [name for name in trained if not torch.equal(new[name], before[name])]
    in_blocks = [name for name in changed if "encoder.layer" in name]
    assert len(in_blocks) == 3 * 2 * 2, "two norms of two tensors in each of three blocks"


def old(name: str) -> str:
    for modern, legacy in OLD_NAMES:
        name = name.replace(modern, legacy)
    return name
