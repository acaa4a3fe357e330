"""One layer's task reads that layer's tensors and nothing else of the model, and fits to all it is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ffsplit.compressors.base import LayerContext, OutputNorm, relative_error
from ffsplit.compressors.distill import DistillCompressor
from ffsplit.compressors.layer import compress_layer
from ffsplit.compressors.prune import PruneCompressor
from ffsplit.compute_profile import ComputeProfile
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.run.stages.fit import LayerJob, RefitJob, compress_layer_job, refit_layer_job
from ffsplit.runtime.ffn_tensors import load_ffn
from ffsplit.splitting.scores import LayerPlan
from ffsplit.store.scratch import Result, Scratch
from tests.conftest import CheckpointFactory

PRUNE = PruneCompressor(compensation="least_squares")
PROFILE = ComputeProfile(device="cpu", dtype="float32", threads=1)
INPUTS_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))


def sampled(scratch: Scratch, folder: Path, name: str, x_TD: Tensor) -> Result:
    path = folder / f"{name}.safetensors"
    save_file({"input": x_TD}, path)
    return scratch.save(name, {path.name: path}, facts={})


def layer_result(model: Path, folder: Path) -> tuple[Scratch, Result]:
    scratch = Scratch(uri=str(folder), prefix="scratch")
    layout = LayerLayout.dense(open_checkpoint(model).shapes[1], num_neurons=32)
    job = LayerJob(
        model=ModelSource(path=str(model)),
        plan=LayerPlan(layer=1, layout=layout, heavy_neurons=tuple(range(32))),
        becomes=1,
        steps=(PRUNE,),
        plain=True,
        inputs=sampled(scratch, folder, "inputs", INPUTS_TD).files,
        scratch=scratch,
        profile=PROFILE,
    )
    return scratch, compress_layer_job(job)


def compressed_layer(model: Path, folder: Path) -> bytes:
    scratch, result = layer_result(model, folder)
    return scratch.path(result.files[0]).read_bytes()


def norm_of(model: Path) -> OutputNorm:
    """BERT's norm after the FFN of layer 1, from the file itself."""
    tensors = load_file(model / "model.safetensors")
    weight, bias = (tensors[f"encoder.layer.1.output.LayerNorm.{name}"] for name in ("weight", "bias"))
    return OutputNorm(weight, bias, eps=1e-12)


def test_a_layer_is_compressed_from_its_own_tensors_alone(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    whole = checkpoint_of("llama")
    holed = Path(shutil.copytree(whole, tmp_path / "holed"))
    own = set(open_checkpoint(whole).ffns[1].tensor_names)
    tensors = load_file(whole / "model.safetensors")
    assert len(own) == 6 < len(tensors)
    holes = {name: tensor if name in own else tensor * torch.nan for name, tensor in tensors.items()}
    save_file(holes, holed / "model.safetensors", {"format": "pt"})
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert compressed_layer(whole, first) == compressed_layer(holed, second)


def test_an_error_is_taken_behind_the_familys_output_norm(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    model = checkpoint_of("bert")
    _, result = layer_result(model, tmp_path)
    ffn = load_ffn(open_checkpoint(model), 1, activation=functional.gelu, device=torch.device("cpu"))
    layout = LayerLayout.dense(open_checkpoint(model).shapes[1], num_neurons=32)
    behind, before = (
        compress_layer(
            ffn,
            heavy_neurons=range(32),
            layout=layout,
            steps=[PRUNE],
            inputs=[INPUTS_TD],
            output_norm=norm,
        ).relative_error
        for norm in (norm_of(model), None)
    )
    assert result.facts["relative_error"] == pytest.approx(behind, rel=1e-6)
    assert behind != pytest.approx(before, rel=1e-2)


def test_a_refit_sees_the_compressed_models_inputs(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    """The error that it ends with is of what the layer sees there, against what the original sees."""
    model = checkpoint_of("bert")
    scratch = Scratch(uri=str(tmp_path), prefix="scratch")
    own_TD = 0.7 * INPUTS_TD + 0.3
    job = RefitJob(
        original=ModelSource(path=str(model)),
        compressed=ModelSource(path=str(model)),
        layer=1,
        step=DistillCompressor(num_steps=1),
        inputs=sampled(scratch, tmp_path, "inputs", INPUTS_TD).files,
        own_inputs=sampled(scratch, tmp_path, "own", own_TD).files,
        scratch=scratch,
        profile=PROFILE,
    )
    error = refit_layer_job(job).facts["relative_error"]
    checkpoint = open_checkpoint(model)
    activation = activation_named(checkpoint.activation_of(1))
    ffn = load_ffn(checkpoint, 1, activation=activation, device=torch.device("cpu"))
    assert error == pytest.approx(
        relative_error(ffn, LayerContext(ffn, [INPUTS_TD], norm_of(model), [own_TD])), rel=1e-6
    )
    assert error != 0, "the model is the original: on its own inputs there is no error"
