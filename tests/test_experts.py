"""Whole experts are dropped: the result is the dense model with its router closed for them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ffsplit
from ffsplit.cli.entry import main
from ffsplit.config import Budget
from ffsplit.errors import BudgetError, ConfigError, UnsupportedModelError
from ffsplit.forecasts import inspect, plan
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.recipes.recipe import parse_recipe
from ffsplit.run.reused_statistics import check_weighs_experts
from ffsplit.store.artifact import open_statistics
from ffsplit.store.manifest import Manifest
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_families import outputs, save_checkpoint
from tests.tiny_mixtures import MIXTURES, masked, save_mixture

PRUNE = "{kind: prune}"
SHARE = "expert_share: 1"
FAST = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3-grouped")
"""Experts stored one by one, a shared expert, a router's bias, and groups with a correction."""


def without(directory: Path, num_dropped: int) -> float:
    """The share of all FFN elements that is left without some whole experts of each block."""
    ffns = open_checkpoint(directory).ffns
    experts = [ffn.shape.num_elements for ffn in ffns if ffn.expert is not None and ffn.expert < num_dropped]
    return 1 - sum(experts) / sum(ffn.shape.num_elements for ffn in ffns)


def compressed(folder: Path, source: Path, *, keep: float, step: str = PRUNE, **fields: Any) -> Manifest:
    folder.mkdir(exist_ok=True)
    job = SmallJob(folder, source)
    recipe = job.recipe(step=step, more=SHARE)
    return ffsplit.compress(job.config(folder / "out", recipe=recipe, keep=keep, **fields))


def attempt_of(manifest: Manifest, folder: Path) -> Path:
    return folder / "out" / manifest.run_key / manifest.attempt


@pytest.mark.matrix(name=FAST)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_result_is_the_dense_model_with_its_router_closed(tmp_path: Path, name: str) -> None:
    source = save_mixture(tmp_path / "source", name)
    num_dropped = 2 if name.endswith("grouped") else 1
    keep = without(source, num_dropped)
    manifest = compressed(tmp_path, source, keep=keep)
    assert manifest.plain and manifest.keep == pytest.approx(keep)
    assert manifest.experts is not None and manifest.measurements is not None
    number = MIXTURES[name].num_experts
    assert (manifest.experts.num_experts, manifest.experts.num_kept) == (number, number - num_dropped)
    dropped = {int(each.block.removeprefix("layer ")): each.experts for each in manifest.experts.dropped}
    assert all(len(experts) == num_dropped for experts in dropped.values())
    if name.endswith("grouped"):
        assert all([expert // 4 for expert in experts] == [0, 1] for experts in dropped.values())
    attempt = attempt_of(manifest, tmp_path)
    small = transformers.AutoModelForCausalLM.from_pretrained(attempt).eval()
    size = sum(tensor.numel() for tensor in load_file(attempt / "model.safetensors").values())
    assert manifest.measurements.compressed_size.num_parameters == size
    dense = load_whole_model(source, manifest.model.architecture)
    before = outputs(dense)
    with masked(dense, name, dropped):
        expected = outputs(dense)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(outputs(small), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.matrix(name=FAST)
@pytest.mark.parametrize("name", MIXTURES)
def test_keeping_everything_changes_no_bit(tmp_path: Path, name: str) -> None:
    source = save_mixture(tmp_path / "source", name)
    manifest = compressed(tmp_path, source, keep=1)
    assert manifest.experts is None and manifest.keep == 1 and manifest.plain
    before, after = (
        load_file(each / "model.safetensors") for each in (source, attempt_of(manifest, tmp_path))
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


LOADS = """
import sys, transformers

model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert "ffsplit" not in sys.modules
"""


@pytest.mark.subprocess
def test_narrower_experts_make_up_the_rest_and_load_without_ffsplit(tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "source", "qwen2_moe", moe_intermediate_size=48)
    least_squares = "{kind: prune, compensation: least_squares}"
    manifest = compressed(tmp_path, source, keep=0.7, step=least_squares)
    assert manifest.plain and manifest.keep == pytest.approx((3 * 40 + 40) / (4 * 48 + 40))
    left = [layer for layer in manifest.layers if not layer.layout.is_dropped]
    assert {layer.layout.num_neurons for layer in left if "shared" in layer.name} == {40}
    assert {layer.layout.num_neurons for layer in left if "shared" not in layer.name} == {40}
    assert len(left) == 8
    assert all((layer.relative_error is None) == layer.layout.is_dropped for layer in manifest.layers)
    command = [sys.executable, "-c", LOADS, str(attempt_of(manifest, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_split_experts_move_up_to_the_places_of_dropped_ones(tmp_path: Path, name: str) -> None:
    """Factors need SplitFFNs, whose tensors and guard carry the numbers of experts."""
    source = save_mixture(tmp_path / "source", name)
    manifest = compressed(tmp_path, source, keep=without(source, 1) - 0.1, step=LOW_RANK)
    assert manifest.plain is False and manifest.experts is not None
    model = ffsplit.load(str(tmp_path / "out"))
    names = [type(module).__name__ for module in model.modules()]
    shared = 2 if name == "qwen2_moe" else 0
    assert names.count("SplitFFN") == 2 * manifest.experts.num_kept + shared
    assert outputs(model).isfinite().all()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_plainly(attempt_of(manifest, tmp_path))


def test_one_block_at_a_time_drops_the_same_experts(tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "source", "mixtral")
    whole = compressed(tmp_path / "whole", source, keep=0.75)
    streamed = compressed(tmp_path / "streamed", source, keep=0.75, block_by_block=True)
    assert streamed.experts == whole.experts is not None
    found, expected = (
        load_file(attempt_of(manifest, tmp_path / folder) / "model.safetensors")
        for manifest, folder in ((streamed, "streamed"), (whole, "whole"))
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def load_plainly(directory: Path) -> Any:
    """Load as transformers does that does not know the format."""
    config = transformers.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    return transformers.AutoModelForCausalLM.from_pretrained(directory, config=config)


def test_documents_say_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_mixture(tmp_path / "source", "mixtral")
    manifest = compressed(tmp_path, source, keep=0.75)
    assert manifest.experts is not None
    (first, second) = manifest.experts.dropped
    said = (
        f"Experts left: 3 of 4 per block (layer 0 without {first.experts[0]}; "
        f"layer 1 without {second.experts[0]})."
    )
    attempt = attempt_of(manifest, tmp_path)
    assert said in capsys.readouterr().err
    assert said in (attempt / "README.md").read_text()
    page = (attempt / "report.html").read_text()
    assert said in page and "Router-weighted output norm" in page and ">dropped<" in page
    for block, dropped in ((manifest.layers[:4], first), (manifest.layers[4:], second)):
        scores = [layer.router_weighted_norm or 0 for layer in block]
        assert scores.index(min(scores)) == dropped.experts[0]
        assert [layer.layout.is_dropped for layer in block].index(True) == dropped.experts[0]
    config = json.loads((attempt / "config.json").read_text())
    assert config["num_local_experts"] == 3 and config["num_experts_per_tok"] == 2


def test_forecasts_count_the_experts_that_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_mixture(tmp_path / "source", "mixtral")
    by_keep = {each.keep: each for each in inspect(str(source), recipe="experts").budgets}
    assert by_keep[0.75].experts_per_block == 3 and by_keep[0.75].layouts[0].num_neurons == 32
    manifest = compressed(tmp_path, source, keep=0.75)
    assert manifest.measurements is not None
    assert by_keep[0.75].num_parameters == manifest.measurements.compressed_size.num_parameters
    (forecast,) = plan(str(tmp_path / "out"), budgets=[Budget(kind="keep", limit=0.75)]).budgets
    assert forecast.experts_per_block == 3 and forecast.plain
    assert [each.layout for each in forecast.layers] == [layer.layout for layer in manifest.layers]
    assert forecast.num_parameters == manifest.measurements.compressed_size.num_parameters
    assert main(["inspect", str(source), "--recipe", "experts"]) == 0
    assert "width 32, 3 experts per block" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "out"), "--keep", "0.75"]) == 0
    out = capsys.readouterr().out
    assert "3 experts" in out and "dropped" in out
    usual = plan(str(tmp_path / "out"), budgets=[Budget(kind="keep", limit=0.75)], recipe="fast").budgets[0]
    assert usual.experts_per_block is None, "another recipe narrows all of them"


def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "llama", "ForCausalLM")
    with pytest.raises(ConfigError, match="drops experts, and this llama has none: use fast"):
        compressed(tmp_path, dense, keep=0.5)
    with pytest.raises(ConfigError, match="drops experts, and this llama has none: use fast"):
        inspect(str(dense), recipe="experts")
    mixture = save_mixture(tmp_path / "mixture", "deepseek_v3")
    with pytest.raises(BudgetError, match=r"2 of 4 experts per block that the router needs: the smallest is"):
        compressed(tmp_path, mixture, keep=0.3)
    with pytest.raises(UnsupportedModelError, match="some experts are left out: give no --only or --skip"):
        compressed(tmp_path, mixture, keep=0.8, skip=("layer 1 expert *",))
    job = SmallJob(tmp_path, save_mixture(tmp_path / "mixtral", "mixtral"))
    manifest = ffsplit.compress(job.config(tmp_path / "earlier"))
    with pytest.raises(ConfigError, match="does not say which its router can spare"):
        plan(str(tmp_path / "earlier"), recipe="experts")
    assert manifest.model.shape.mixture is None


def test_statistics_are_reused_if_they_have_the_routers_weights(tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "source", "mixtral")
    job = SmallJob(tmp_path, source)
    ffsplit.compress(job.config(tmp_path / "earlier"))
    stats = str(tmp_path / "earlier")
    first = compressed(tmp_path, source, keep=0.75)
    again = compressed(tmp_path / "again", source, keep=0.75, stats=stats)
    assert again.experts == first.experts
    origin = open_statistics(stats)
    check_weighs_experts(origin)
    layers = tuple(
        layer.model_copy(update={"router_weighted_norm": None}) for layer in origin.manifest.layers
    )
    lacking = replace(origin, manifest=origin.manifest.model_copy(update={"layers": layers}))
    with pytest.raises(ConfigError, match="does not say how the router weighted each expert"):
        check_weighs_experts(lacking)


@pytest.mark.parametrize("more", ["heavy_energy: 0.9", "heavy_share: 1\nallocation: search"])
def test_the_number_of_experts_cannot_depend_on_statistics(more: str) -> None:
    text = f"name: x\ndescription: x\n{more}\nexpert_share: 0.5\nsteps: [{{kind: low_rank}}]\n"
    with pytest.raises(ConfigError, match="expert_share needs heavy_share or heavy_fraction"):
        parse_recipe(text, where="x.yaml")
