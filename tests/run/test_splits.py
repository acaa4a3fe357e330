"""What no split FFN can stand for is refused before the work, and no tensor of a result is made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ffsplit
from benchmarks.families.tiny import model_types, save, tiny_model
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.run import checks
from ffsplit.run.job import prepare
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_rows import calibration

INT8 = "after_healing: {kind: quantize, num_bits: 8}"


def job_of(family: str, folder: Path) -> SmallJob:
    save(tiny_model(family, model_types()[family]), folder / "model")
    return SmallJob(folder, folder / "model")


@pytest.mark.parametrize("family", ["esm", "mobilebert", "rwkv", "zamba", "zamba2"])
def test_integers_are_refused_where_an_ffn_can_only_be_narrowed(tmp_path: Path, family: str) -> None:
    job = job_of(family, tmp_path)
    recipe = job.recipe(step="{kind: prune}", more=INT8)
    with pytest.raises(ffsplit.ConfigError, match="can only be made narrower"):
        prepare(job.config(tmp_path / "out", recipe=recipe, keep=0.9))


def test_experts_are_not_split_beside_others_that_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ERNIE's files number experts for text and for pictures through; text alone leaves the latter out."""
    job = job_of("ernie4_5_vl_moe", tmp_path)
    config = job.config(tmp_path / "out", recipe=job.recipe(step=LOW_RANK), samples=24)
    with pytest.raises(ffsplit.ConfigError, match=r"vision moe expert 0 .* can only be made narrower"):
        prepare(config)
    monkeypatch.setattr(checks, "_check_left_out_experts", lambda *_, **__: None)
    with pytest.raises(ffsplit.FFSplitError, match=r"finds no tensor for .*vision_moe\.experts"):
        ffsplit.compress(config)
    assert not list(tmp_path.glob("out/*/commit.json"))


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_experts_that_are_modules_may_be_split(tmp_path: Path, family: str) -> None:
    job = job_of(family, tmp_path)
    pairs = calibration(open_checkpoint(job.model), tmp_path)
    recipe = job.recipe(step=LOW_RANK)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=24, calibration=(pairs,)))
    assert manifest.plain is False
    model, dense = (
        ffsplit.load(str(tmp_path / "out")),
        load_whole_model(job.model, manifest.model.architecture),
    )
    assert any(type(module).__name__ == "SplitFFN" for module in model.modules())
    routers = {name: each for name, each in dense.named_parameters() if "router" in name}
    assert routers and all(torch.equal(each, model.get_parameter(name)) for name, each in routers.items())
