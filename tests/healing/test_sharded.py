"""A divided model heals as a whole one does, here in two processes on CPUs that are connected by gloo."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ffsplit.compressors import QuantizeCompressor
from ffsplit.compute_profile import ComputeProfile
from ffsplit.ffn.quantization import fake_quantize
from ffsplit.healing.settings import HealingSettings
from ffsplit.healing.sharded import checkpoint_blocks
from ffsplit.models.fetch import ModelSource
from ffsplit.run.stages.heal import HealJob, heal_job
from ffsplit.store.scratch import Result, Scratch
from tests.conftest import CheckpointFactory
from tests.tiny_models import WORDS, make_model

SIZE = 2
MODELS = {
    "llama": ("llama", "ForCausalLM"),
    "tied": ("opt", "ForCausalLM"),
    "encoder": ("bert", ""),
    "classifier": ("bert", "ForSequenceClassification"),
}


def job_of(folder: Path, checkpoint_of: CheckpointFactory, model: str, **fields: Any) -> HealJob:
    family, head = MODELS[model]
    rows = tuple(" ".join(WORDS[i : i + 3 + i % 5]) for i in range(41))
    settings = {"epochs": 2, "batch_rows": 8, "batch_tokens": 2048, "learning_rate": 1e-3}
    settings |= {"mixed_precision": "no", "checkpoint_minutes": 0} | fields.pop("settings", {})
    return HealJob(
        original=ModelSource(path=str(checkpoint_of(family, head=head))),
        compressed=ModelSource(path=str(checkpoint_of(family, head=head, seed=1))),
        rows=rows[:28],
        validation=rows[28:],
        max_length=32,
        batch_tokens=64,
        seed=0,
        settings=HealingSettings(**settings),
        linears="kept",
        scratch=Scratch(uri=str(folder), prefix="run/heal"),
        profile=ComputeProfile(device="cpu", dtype="float32", threads=1),
        threads=1,
        workers=SIZE,
        **({"quantization": None} | fields),
    )


STOPPED_AT = 3


@pytest.fixture(scope="module")
def jobs(checkpoint_of: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, HealJob]:
    """Jobs that two processes have done together; "stopped" was stopped, and done again."""
    folder = tmp_path_factory.mktemp("divided")
    made = {name: job_of(folder / name, checkpoint_of, name) for name in MODELS}
    made["stopped"] = job_of(folder / "stopped", checkpoint_of, "llama")
    rounding: dict[str, Any] = {"quantization": QuantizeCompressor(), "settings": {"epochs": 1}}
    made["rounded"] = job_of(folder / "rounded", checkpoint_of, "llama", **rounding)
    made["bf16"] = job_of(
        folder / "bf16", checkpoint_of, "llama", settings={"epochs": 1, "mixed_precision": "bf16"}
    )
    steps = [(made[name], None) for name in (*MODELS, "rounded", "bf16")]
    steps += [(made["stopped"], STOPPED_AT), (made["stopped"], None)]
    (folder / "jobs.json").write_text(
        json.dumps([(job.model_dump(mode="json"), stop_at) for job, stop_at in steps]), "utf-8"
    )
    command = [sys.executable, "-m", "tests.healing.divided"]
    processes = [subprocess.Popen([*command, str(rank), str(SIZE), str(folder)]) for rank in range(SIZE)]
    while {process.poll() for process in processes} in ({None}, {None, 0}):
        time.sleep(0.1)
    for process in processes:  # it would wait for one that has failed
        process.kill()
    assert [process.wait(60) for process in processes] == [0] * SIZE
    return made


def result_of(job: HealJob) -> Result:
    result = job.scratch.load("healed")
    assert result is not None
    return result


def alone(job: HealJob, folder: Path) -> tuple[Result, dict[str, torch.Tensor]]:
    """The result of the same shares of every step in this process, of a whole model."""
    job = job.model_copy(update={"scratch": Scratch(uri=str(folder), prefix="run/heal")})
    result = heal_job(job)
    assert result is not None
    return result, tensors_of(job)


def tensors_of(job: HealJob) -> dict[str, torch.Tensor]:
    return load_file(job.scratch.path(result_of(job).files[0]))


def apart(job: HealJob, expected: dict[str, torch.Tensor]) -> float:
    """The squared distance of a job's tensors from the expected, relative to how far these moved."""
    before, found = load_file(Path(job.compressed.path) / "model.safetensors"), tensors_of(job)
    moved = sum(float((each - before[name]).square().sum()) for name, each in expected.items())
    assert moved > 0.01
    return sum(float((found[name] - each).square().sum()) for name, each in expected.items()) / moved


@pytest.mark.subprocess
@pytest.mark.parametrize("model", MODELS)
def test_a_divided_model_heals_as_a_whole_one(model: str, jobs: dict[str, HealJob], tmp_path: Path) -> None:
    """Its tensors are whole again, and all of them are there."""
    divided, found = result_of(jobs[model]), tensors_of(jobs[model])
    whole, expected = alone(jobs[model], tmp_path)
    for loss in ("first_loss", "best_loss"):
        assert divided.facts[loss] == pytest.approx(whole.facts[loss], rel=1e-3)
    assert divided.facts["num_steps"] == whole.facts["num_steps"]
    assert float(str(divided.facts["best_loss"])) < 0.95 * float(str(divided.facts["first_loss"]))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
    # Adam moves a weight whose gradient is rounding alone as far as any other
    assert apart(jobs[model], expected) < 0.01


@pytest.mark.subprocess
def test_a_stopped_run_of_a_divided_model_gives_the_same_bytes(jobs: dict[str, HealJob]) -> None:
    """It resumes from the newest step that all processes have, and leaves one state of each."""
    stopped, unbroken = result_of(jobs["stopped"]), result_of(jobs["llama"])
    assert (stopped.files[0].sha256, stopped.facts) == (unbroken.files[0].sha256, unbroken.facts)
    last = int(str(unbroken.facts["num_steps"]))
    kept = sorted(path.name for path in Path(jobs["stopped"].scratch.uri).glob("run/heal/progress-*"))
    ends = ("json", "safetensors")
    assert kept == [f"progress-{rank}-of-{SIZE}-{last:08d}.{end}" for rank in range(SIZE) for end in ends]
    parts = [
        load_file(Path(jobs["stopped"].scratch.uri) / "run/heal" / name)
        for name in kept
        if name.endswith("safetensors")
    ]
    weight = "weights.model.layers.0.mlp.up_proj.weight"
    assert parts[0][weight].shape == parts[1][weight].shape != tensors_of(jobs["llama"])[weight[8:]].shape


@pytest.mark.subprocess
def test_a_divided_model_sees_the_integers_it_ends_with(jobs: dict[str, HealJob], tmp_path: Path) -> None:
    whole, expected = alone(jobs["rounded"], tmp_path)
    assert result_of(jobs["rounded"]).facts["best_loss"] == pytest.approx(whole.facts["best_loss"], rel=1e-2)
    matrices = {name: each for name, each in tensors_of(jobs["rounded"]).items() if "_proj.weight" in name}
    on_grid = {
        name
        for name, each in matrices.items()
        if torch.equal(each, fake_quantize(each, num_bits=8, group_size=None))
    }
    assert on_grid == {name for name in matrices if ".mlp." in name} and set(matrices) <= set(expected)


@pytest.mark.subprocess
def test_a_divided_model_computes_in_bfloat16(jobs: dict[str, HealJob], tmp_path: Path) -> None:
    """It is judged so as well, and takes the steps that a whole model takes."""
    whole, expected = alone(jobs["bf16"], tmp_path)
    assert apart(jobs["bf16"], expected) < 0.02
    found, full = (result_of(jobs[name]).facts["first_loss"] for name in ("bf16", "llama"))
    assert found != full and found == pytest.approx(full, rel=0.02)
    assert result_of(jobs["bf16"]).facts["best_loss"] == pytest.approx(whole.facts["best_loss"], rel=0.05)


def test_blocks_that_are_computed_twice_have_the_same_gradient() -> None:
    ids = torch.arange(5, 17)[None]
    gradients = []
    for is_twice in (False, True):
        model = make_model("llama", head="ForCausalLM")
        model.config.use_cache = False
        calls = []
        model.model.layers[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if is_twice:
            checkpoint_blocks(model, [f"layers.{index}" for index in range(3)])
        model(ids).logits.square().sum().backward()
        assert len(calls) == 1 + is_twice
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
