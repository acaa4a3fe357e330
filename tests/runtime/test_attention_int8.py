"""Attention's linear layers with int8 weights: the whole way, and no load without ffsplit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ffsplit
from ffsplit.config import JobConfig
from ffsplit.errors import ArtifactError, ConfigError, UnsupportedModelError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.recipes.recipe import load_recipe, parse_recipe
from ffsplit.run.job import prepare
from ffsplit.runtime.attention_int8 import attention_linears, install_linears, linears_config
from ffsplit.runtime.ffn_tensors import FORMAT_VERSION
from ffsplit.runtime.quantized_linear import QuantizedLinear
from tests.conftest import CheckpointFactory
from tests.runtime.compressed import head_of, outputs
from tests.small_jobs import SmallJob
from tests.tiny_families import save_checkpoint

STEPS = "after_healing: {kind: quantize, num_bits: 8}"
PER_BLOCK = {"bert": 4, "distilbert": 4, "opt": 4, "llama": 4}


@pytest.fixture(scope="module", params=sorted(PER_BLOCK))
def artifact(
    request: Any, checkpoint_of: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, Any]:
    """A family, its checkpoint, the artifact that `linears: int8` makes of it, and its manifest."""
    family, folder = request.param, tmp_path_factory.mktemp("linears")
    source = checkpoint_of(family, head=head_of(family))
    job = SmallJob(folder, source)
    recipe = job.recipe(more=f"{STEPS}\nlinears: int8")
    manifest = ffsplit.compress(JobConfig(**job.config(folder / "out", recipe=recipe).model_dump()))
    (config,) = (folder / "out").glob("*/*/config.json")
    return family, source, config.parent, manifest


def test_its_outputs_are_those_of_the_matrices_in_floating_point(artifact: Any) -> None:
    family, _, directory, manifest = artifact
    model = load_whole_model(directory, manifest.model.architecture)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 3 * (PER_BLOCK[family] + 2)
    found = outputs(model)
    assert all(module.is_packed for module in linears)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.num_columns, module.num_rows, bias=module.bias is not None)
            linear.weight.data, linear.bias = module.float_weight(torch.float32), module.bias
            activation = [module.activation] if module.activation is not None else []
            model.set_submodule(name, _Plus(nn.Sequential(linear, *activation)))
    expected = outputs(model)
    assert (found - expected).norm() <= 0.05 * expected.norm()


class _Plus(nn.Module):
    """A module whose output is added to `plus`, as that of a linear map is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.module(x)
        return y if plus is None else y + plus


def test_the_bytes_are_those_that_the_manifest_says(artifact: Any) -> None:
    family, source, directory, manifest = artifact
    before = load_file(source / "model.safetensors")
    tensors = load_file(directory / "model.safetensors")
    endings = tuple(f".{path}.weight" for path in manifest.linears.modules)
    names = [n for n, t in tensors.items() if t.dtype == torch.uint8 and n.endswith(endings)]
    assert len(names) == 3 * PER_BLOCK[family]
    assert manifest.linears.size_bytes == sum(tensors[n].numel() for n in names)
    scales = sum(2 * len(before[n]) for n in names)
    assert manifest.linears.num_elements == manifest.linears.size_bytes - scales
    assert manifest.linears.num_elements == sum(before[n].numel() for n in names)
    assert manifest.linears.original_size_bytes == 4 * manifest.linears.num_elements
    assert manifest.plain is False


def test_a_saved_model_is_the_artifact_again(artifact: Any, tmp_path: Path) -> None:
    _, _, directory, manifest = artifact
    model = load_whole_model(directory, manifest.model.architecture)
    found = outputs(model)
    model.save_pretrained(tmp_path)
    first, second = (load_file(each / "model.safetensors") for each in (directory, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name].to(first[name].dtype)) for name in first)
    assert torch.equal(outputs(load_whole_model(tmp_path, manifest.model.architecture)), found)


@pytest.mark.matrix(artifact=("bert",))
@pytest.mark.subprocess
def test_no_load_without_ffsplit(artifact: Any, tmp_path: Path) -> None:
    _, _, directory, manifest = artifact
    code = (
        "import transformers, sys\n"
        f"transformers.{manifest.model.architecture}.from_pretrained({str(directory)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "ignore_mismatched_sizes" in done.stderr


def test_an_older_ffsplit_would_refuse_it(artifact: Any) -> None:
    config = json.loads((artifact[2] / "config.json").read_text())["quantization_config"]
    assert config["version"] == FORMAT_VERSION and config["linears"]["modules"]


def test_linears_go_with_quantized_ffns() -> None:
    recipe = load_recipe("int8")
    assert recipe.steps == load_recipe("fast").steps and recipe.linears == "int8"
    text = "name: mine\ndescription: Mine.\nheavy_share: 1\nlinears: int8\nsteps: [{kind: prune}]"
    with pytest.raises(ConfigError, match="linears: int8 needs after_healing"):
        parse_recipe(text, where="mine.yaml")


def test_linears_that_are_stored_transposed_are_refused(small_job: SmallJob, tmp_path: Path) -> None:
    small_job.model = save_checkpoint(tmp_path / "gpt2", "gpt2", "LMHeadModel")
    recipe = small_job.recipe(more=f"{STEPS}\nlinears: int8")
    with pytest.raises(UnsupportedModelError, match="a gpt2 stores its linear layers transposed"):
        prepare(small_job.config(tmp_path / "out", recipe=recipe))


def test_attention_in_float64_has_no_linears(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    """Its FFNs can be split all the same."""
    shutil.copytree(checkpoint_of("bert"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".attention." in name and tensor.dim() == 2:
            tensors[name] = tensor.double()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="no linear layers of attention are known in a bert"):
        attention_linears(open_checkpoint(tmp_path / "model"))


@pytest.mark.parametrize("name", ["dropout", "nothing"])
def test_a_config_that_names_no_linear_layer_is_refused(name: str, checkpoint_of: CheckpointFactory) -> None:
    base = load_whole_model(checkpoint_of("bert"), "BertModel")
    place = "encoder.layer.0.attention.self"
    config = linears_config((f"{place}.query", f"{place}.{name}"))
    with pytest.raises(ArtifactError, match=f"names {place}.{name}, which is not a linear layer"):
        install_linears(base, config)
