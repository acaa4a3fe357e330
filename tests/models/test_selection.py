"""Which FFNs a run is about: `--only`, `--skip`, and towers that the calibration data does not reach."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import ffsplit
from benchmarks.families.tiny import save, tiny_model
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.models.selection import chosen, left_out_ffns
from ffsplit.report.humanize import unchanged_in_words
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_families import outputs, save_checkpoint
from tests.tiny_rows import calibration

PRUNE = "{kind: prune}"


def words(text: str) -> str:
    """The same text on one line, whatever its spaces."""
    return " ".join(text.split())


def job_on(tmp_path: Path, family: str, head: str) -> SmallJob:
    return SmallJob(tmp_path, save_checkpoint(tmp_path / "model", family, head))


@pytest.mark.parametrize("step", [PRUNE, LOW_RANK])
def test_what_is_skipped_stays_byte_for_byte(
    tmp_path: Path, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_on(tmp_path, "bert", "ForMaskedLM")
    share = 1.0 if step == PRUNE else 0.5
    recipe = job.recipe(step=step, heavy_share=share)
    config = job.config(tmp_path / "out", recipe=recipe, samples=8, skip=("layer 0",), keep=0.5)
    manifest = ffsplit.compress(config)
    assert [layer.name for layer in manifest.layers] == ["layer 1"]
    assert "states fewer blocks" not in capsys.readouterr().err
    (left_out,) = manifest.model.left_out_ffns
    assert (left_out.num_ffns, left_out.reason) == (1, "--only and --skip leave them out")
    assert manifest.keep is not None and 0.7 < manifest.keep <= 0.75, "of all FFNs, half of one of two"
    assert manifest.plain is False, "the config has one width for both layers"
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    before, after = (load_file(folder / "model.safetensors") for folder in (job.model, attempt))
    kept = [name for name in before if ".layer.0." in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    model = ffsplit.load(str(tmp_path / "out"))
    dense = load_whole_model(job.model, manifest.model.architecture)
    assert (outputs(model) - outputs(dense)).abs().max() > 1e-3


def test_only_and_skip_are_part_of_the_run_key(tmp_path: Path) -> None:
    job = job_on(tmp_path, "bert", "ForMaskedLM")
    recipe = job.recipe(step=PRUNE)
    keys = [
        ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=8, **which)).run_key
        for which in ({}, {"only": ("layer 0",)}, {"skip": ("layer 1",)}, {"skip": ("layer 0",)})
    ]
    assert keys[1] == keys[2], "they choose the same"
    assert len(set(keys)) == 3


def test_a_tower_that_text_does_not_reach_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_on(tmp_path, "llava", "ForConditionalGeneration")
    recipe = job.recipe(step=PRUNE)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=8, keep=0.5))
    (left_out,) = manifest.model.left_out_ffns
    assert left_out.tower == "vision tower encoder" and left_out.num_ffns == 2
    about = manifest.model.shape.ffn_elements
    said = unchanged_in_words((left_out,), ffn_elements=about)
    assert said.startswith("Left unchanged: 2 FFNs of the vision tower encoder, since the calibration data")
    assert words(said) in words(capsys.readouterr().err)
    assert manifest.plain, "the vision tower has a width of its own in config.json"
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    for page in ("README.md", "report.html"):
        assert said in (attempt / page).read_text("utf-8")
    before, after = (load_file(folder / "model.safetensors") for folder in (job.model, attempt))
    vision = [name for name in before if "vision" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    assert AutoModel.from_pretrained(attempt).config.text_config.intermediate_size < 32
    assert main(["inspect", str(job.model)]) == 0
    assert words(said) in words(capsys.readouterr().out)
    assert ffsplit.inspect(str(job.model)).left_out_ffns == (left_out,)


@pytest.mark.parametrize("only", [(), ("vision tower*",)])
def test_pictures_reach_all_towers(tmp_path: Path, only: tuple[str, ...]) -> None:
    model = tiny_model("llava", "LlavaForConditionalGeneration")
    assert not save(model, tmp_path / "model")
    job = SmallJob(tmp_path, tmp_path / "model")
    rows = (calibration(open_checkpoint(job.model), tmp_path, richest=True),)
    recipe = job.recipe(step=PRUNE)
    config = job.config(
        tmp_path / "out", recipe=recipe, samples=8, calibration=rows, keep=0.5, only=only, max_length=16
    )
    manifest = ffsplit.compress(config)
    towers = {layer.name.split(" layer")[0] for layer in manifest.layers}
    assert towers == {"vision tower encoder"} | ({"language model"} if not only else set())
    assert [each.tower for each in manifest.model.left_out_ffns] == (["language model"] if only else [])
    assert manifest.keep is not None and (0.4 < manifest.keep <= 0.5 or only)
    assert manifest.measurements is not None
    assert set(manifest.measurements.fidelity) >= {"kl_divergence", "top1_agreement"}
    timed = manifest.measurements.latency
    assert [each.batch_size for each in timed] == [1, 2]
    assert {each.num_tokens for each in timed}.isdisjoint({8}), "held-out rows, as long as they are"
    loaded = ffsplit.load(str(tmp_path / "out"))
    assert type(loaded) is type(model)


def test_split_ffns_beside_a_tower_that_is_left_out_load(tmp_path: Path) -> None:
    job = job_on(tmp_path, "llava", "ForConditionalGeneration")
    recipe = job.recipe(step=LOW_RANK, heavy_share=0.5)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=8))
    assert not manifest.plain
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    config = json.loads((attempt / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["left_out"] == ["vision_tower.encoder.layers.*"]
    names = [type(module).__name__ for module in ffsplit.load(str(tmp_path / "out")).modules()]
    assert names.count("SplitFFN") == 2


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_run_about_one_tower_measures_the_whole_model(tmp_path: Path, family: str) -> None:
    """Without the decoder's FFNs, a translator is still one, not an encoder."""
    job = job_on(tmp_path, family, "ForConditionalGeneration")
    rows = (calibration(open_checkpoint(job.model), tmp_path),)
    fields = {"recipe": job.recipe(step=PRUNE), "samples": 8, "calibration": rows}
    half = chosen(open_checkpoint(job.model), only=("encoder*",), skip=())
    assert half.makes == "target" and half.is_whole
    manifest = ffsplit.compress(job.config(tmp_path / "out", only=("encoder*",), **fields))
    assert {layer.name.split()[0] for layer in manifest.layers} == {"encoder"}
    assert manifest.calibration.sources == ("pairs.csv#source,target",)
    model = load_whole_model(job.model, manifest.model.architecture)
    named = model.named_parameters()
    in_blocks = sum(each.numel() for name, each in named if re.search(r"\.(layers|block)\.\d", name))
    assert manifest.measurements is not None
    assert manifest.measurements.original_size.num_parameters_without_embeddings == in_blocks
    card = (tmp_path / "out" / manifest.run_key / manifest.attempt / "README.md").read_text("utf-8")
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert type(ffsplit.load(str(tmp_path / "out"))).__name__ == manifest.model.architecture


def test_healing_leaves_what_is_skipped_as_it_was(tmp_path: Path) -> None:
    job = job_on(tmp_path, "bert", "ForMaskedLM")
    healing = "healing: {epochs: 1, batch_rows: 4, learning_rate: 0.01, evaluations: 1, min_steps: 8}"
    recipe = job.recipe(step=PRUNE, more=healing)
    manifest = ffsplit.compress(
        job.config(tmp_path / "out", recipe=recipe, samples=16, skip=("layer 0",), keep=0.5)
    )
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    before, after = (load_file(folder / "model.safetensors") for folder in (job.model, attempt))
    same = {name for name in before if before[name].equal(after[name])}
    first = {name for name in before if ".layer.0." in name}
    skipped = {name for name in first if re.search(r"layer\.0\.(intermediate|output)\.dense", name)}
    assert len(skipped) == 4 and skipped <= same
    assert not (first - skipped) & same, "the rest is healed"


def test_healing_leaves_a_trained_activation_that_is_skipped(tmp_path: Path) -> None:
    save(tiny_model("apertus", "ApertusForCausalLM"), tmp_path / "model")
    job = SmallJob(tmp_path, tmp_path / "model")
    healing = "healing: {epochs: 4, batch_rows: 4, learning_rate: 0.001, evaluations: 3, min_steps: 60}"
    recipe = job.recipe(step=PRUNE, more=healing)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=24, skip=("layer 0",)))
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    before, after = (load_file(folder / "model.safetensors") for folder in (job.model, attempt))
    name = "model.layers.{}.mlp.act_fn.alpha_p"
    assert torch.equal(before[name.format(0)], after[name.format(0)])
    assert not torch.equal(before[name.format(1)], after[name.format(1)]), "the rest is healed"


def test_bad_patterns_are_one_line(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "mbart", "mbart", "ForConditionalGeneration"))
    there = r"there are encoder layer N, decoder layer N \(N: a number\)"
    with pytest.raises(ConfigError, match=rf"no FFN is called 'vision\*': {there}"):
        chosen(checkpoint, only=("vision*",), skip=())
    with pytest.raises(ConfigError, match="leave no FFN to compress"):
        chosen(checkpoint, only=(), skip=("encoder*", "decoder*"))
    half = chosen(checkpoint, only=("decoder*",), skip=())
    assert [ffn.name for ffn in half.ffns] == ["decoder layer 0", "decoder layer 1"]
    assert [ffn.index for ffn in half.ffns] == [0, 1]
    assert [each.tower for each in left_out_ffns(half)] == ["encoder"]
    pictures = open_checkpoint(save_checkpoint(tmp_path / "llava", "llava", "ForConditionalGeneration"))
    with pytest.raises(ConfigError, match="does not reach vision tower encoder layer 0"):
        chosen(pictures, only=("vision*",), skip=())
    mixture = open_checkpoint(save_checkpoint(tmp_path / "mixtral", "mixtral", "ForCausalLM"))
    for patterns in ({"only": ("*expert 0",), "skip": ()}, {"only": (), "skip": ("layer 1 expert 2",)}):
        with pytest.raises(ConfigError, match=r"all experts of a block, or none .* 'layer \d expert \*'"):
            chosen(mixture, **patterns)
    whole = chosen(mixture, only=(), skip=("layer 1 expert *",))
    assert [ffn.name for ffn in whole.ffns] == [f"layer 0 expert {number}" for number in range(4)]
