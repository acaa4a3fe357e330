"""Every family of the table: an exact split is the dense model, a compressed one saves, loads and runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffsplit
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.ffn.weights import FFNPart, LinearMap
from ffsplit.measurement.latency import example_inputs
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.assemble import assemble
from ffsplit.runtime.ffn_tensors import layer_tensors, load_activation, load_ffn
from tests.small_jobs import SmallJob
from tests.tiny_families import FAMILIES, heads_of, outputs, save_checkpoint, usual_head
from tests.tiny_rows import calibration

CPU = torch.device("cpu")
WITH_HEADS = [(name, head) for name in FAMILIES for head in ("", *heads_of(name))]
FAST = ("bert", "gpt2", "phi3", "t5", "mixtral", "vit", "clip", "whisper", "wav2vec2")
"""A family of each kind and of each form of FFN."""
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("bert", "ForMaskedLM")`: a checkpoint, made once."""
    made: dict[Any, Path] = {}

    def make(family: str, head: str = "", dtype: torch.dtype = torch.float32) -> Path:
        key = (family, head, dtype)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(family), family, head, dtype=dtype)
        return made[key]

    return make


def test_every_row_has_a_tiny_model() -> None:
    assert {family.model_type or name for name, family in FAMILIES.items()} >= set(ARCHITECTURES)


def factored(part: FFNPart) -> FFNPart:
    """The same part as factors of full rank, which do not fold into a dense part."""

    def factors(linear: LinearMap) -> LinearMap:
        return LinearMap.low_rank(torch.eye(len(linear.weight)), linear.weight, linear.bias)

    gate = None if part.gate is None else factors(part.gate)
    return replace(part, up=factors(part.up), gate=gate, down=factors(part.down))


def split_exactly(checkpoint: Checkpoint, directory: Path) -> None:
    """An artifact whose FFNs are two dense parts each: every other neuron, and the rest."""
    files, layouts = [], []
    directory.mkdir()
    for ffn in checkpoint.ffns:
        activation = load_activation(checkpoint, ffn.index, device=CPU)
        weights = load_ffn(checkpoint, ffn.index, activation=activation, device=CPU)
        weights = weights.split(torch.arange(0, ffn.shape.num_neurons, 2))
        weights = replace(weights, light=factored(weights.light))
        files.append(directory.with_name(f"{directory.name}-{ffn.index}.safetensors"))
        save_file(layer_tensors(checkpoint, ffn.index, weights, plain=False), files[-1])
        layouts.append(weights.layout)
    assemble(checkpoint, files, layouts, directory)


NARROWED_ONLY = ("esm", "mobilebert", "gpt_oss", "segformer", "levit")
"""Families whose activation is a function, clamps, is one of several in a block, or comes after a convolution
or a batch norm: no split is possible."""


@pytest.mark.matrix()
@pytest.mark.parametrize(("family", "head"), [each for each in WITH_HEADS if each[0] not in NARROWED_ONLY])
def test_an_exact_split_is_the_dense_model(saved: Saved, tmp_path: Path, family: str, head: str) -> None:
    checkpoint = open_checkpoint(saved(family, head))
    split_exactly(checkpoint, tmp_path / "split")
    dense, split = (
        load_whole_model(directory, checkpoint.class_name)
        for directory in (checkpoint.directory, tmp_path / "split")
    )
    names = [type(module).__name__ for module in split.modules()]
    assert names.count("SplitFFN") == len(checkpoint.ffns)
    assert (outputs(split) - outputs(dense)).abs().max() <= 1e-5


NEVER_PLAIN = ("bloom", "swin", "segformer", "levit")
"""No config states Bloom's width; Swin's, SegFormer's and LeViT's are ratios."""


@pytest.mark.matrix(family=FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_it_saves_loads_and_runs(saved: Saved, tmp_path: Path, family: str) -> None:
    source = saved(family, usual_head(family))
    job = SmallJob(tmp_path, source)
    recipe = job.recipe(step="{kind: prune}")
    rows = (calibration(open_checkpoint(source), tmp_path),)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, samples=16, calibration=rows))
    assert manifest.measurements is not None
    sizes, left_out = manifest.measurements, sum(each.num_elements for each in manifest.model.left_out_ffns)
    before, after = (each.ffn_elements - left_out for each in (sizes.original_size, sizes.compressed_size))
    assert 0.35 < after / before <= 0.5
    assert manifest.plain == (family not in NEVER_PLAIN)
    model = ffsplit.load(str(tmp_path / "out"))
    found = outputs(model)
    assert found.isfinite().all()
    assert (found - outputs(load_whole_model(source, manifest.model.architecture))).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load_whole_model(tmp_path / "again", manifest.model.architecture)), found)
    if model.can_generate():
        inputs = example_inputs(model, num_rows=1, num_tokens=3)[model.main_input_name]
        generated = model.generate(inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape[1] > (0 if model.config.is_encoder_decoder else 3)


TOWERS = {
    "t5": ("T5EncoderModel",),
    "bart": ("BartForCausalLM",),
    "clip": ("CLIPTextModel", "CLIPVisionModel"),
}
LOADS_TOWERS = """
import sys, transformers

for each in sys.argv[1:]:
    name, directory = each.split("=")
    try:
        getattr(transformers, name).from_pretrained(directory)
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
    else:
        sys.exit(f"{name} was loaded")
assert "ffsplit" not in sys.modules
"""


@pytest.mark.subprocess
def test_no_tower_loads_alone_without_ffsplit(saved: Saved, tmp_path: Path) -> None:
    """Each tower has a guard of its own."""
    arguments = []
    for family, names in TOWERS.items():
        split_exactly(open_checkpoint(saved(family, usual_head(family))), tmp_path / family)
        arguments += [f"{name}={tmp_path / family}" for name in names]
    command = [sys.executable, "-c", LOADS_TOWERS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "phi3", "modernbert", "gemma2"])
def test_dtype_and_tied_weights_are_kept(
    saved: Saved, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(saved(family, usual_head(family), dtype))
    split_exactly(checkpoint, tmp_path / "split")
    tensors = load_file(tmp_path / "split" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    model = load_whole_model(tmp_path / "split", checkpoint.class_name)
    assert model.dtype == dtype
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_tensor(saved: Saved, tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(saved(family, usual_head(family)))
    files, layouts = [], [LayerLayout.dense(shape) for shape in checkpoint.shapes]
    for ffn in checkpoint.ffns:
        weights = load_ffn(checkpoint, ffn.index, activation=torch.relu, device=CPU)
        files.append(tmp_path / f"{ffn.index}.safetensors")
        save_file(layer_tensors(checkpoint, ffn.index, weights, plain=True), files[-1])
    assemble(checkpoint, files, layouts, tmp_path / "same")
    before, after = (
        load_file(each / "model.safetensors") for each in (checkpoint.directory, tmp_path / "same")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
