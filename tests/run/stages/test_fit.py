"""One layer's task reads that layer's tensors and nothing else of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ffsplit.compressors.prune import PruneCompressor
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.locate import ModelSource
from ffsplit.profile import ComputeProfile
from ffsplit.run.stages.fit import LayerJob, compress_layer_job
from ffsplit.splitting.scores import LayerPlan
from ffsplit.store.scratch import Scratch
from tests.conftest import CheckpointFactory


def compressed_layer(model: Path, folder: Path) -> bytes:
    scratch = Scratch(uri=str(folder), prefix="scratch")
    inputs = folder / "inputs.safetensors"
    save_file({"input": torch.randn(50, 32, generator=torch.Generator().manual_seed(0))}, inputs)
    sampled = scratch.save("inputs", {"inputs.safetensors": inputs}, facts={})
    layout = LayerLayout.dense(open_checkpoint(model).shapes[1], num_neurons=32)
    job = LayerJob(
        model=ModelSource(path=str(model)),
        plan=LayerPlan(layer=1, layout=layout, heavy_neurons=tuple(range(32))),
        steps=(PruneCompressor(compensation="least_squares"),),
        plain=True,
        inputs=sampled.files,
        scratch=scratch,
        profile=ComputeProfile(device="cpu", dtype="float32", threads=1),
    )
    return scratch.path(compress_layer_job(job).files[0]).read_bytes()


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
