"""Sizes counted from headers and layouts are those of the models that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ffsplit.ffn.shapes import LayerLayout
from ffsplit.measurement.size import compressed_size, original_size
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.store.manifest import Size
from tests.conftest import CheckpointFactory
from tests.runtime.compressed import compress, head_of
from tests.tiny_models import FAMILIES


def counted(directory: Path, class_name: str, blocks: str) -> tuple[int, int]:
    """Parameters of the loaded model, all of them and those of its blocks."""
    model = load_whole_model(directory, class_name)
    base = getattr(model, model.base_model_prefix, model)
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, sum(parameter.numel() for parameter in base.get_submodule(blocks).parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_the_parameters_are_those_of_the_loaded_models(
    checkpoint_of: CheckpointFactory, tmp_path: Path, family: str, recipe: str
) -> None:
    source = checkpoint_of(family, head=head_of(family))
    compressed = compress(source, tmp_path / "artifact", recipe=recipe)
    checkpoint, blocks = compressed.source, compressed.source.architecture.towers[0].path
    file_bytes = (compressed.directory / "model.safetensors").stat().st_size
    before = original_size(checkpoint)
    after = compressed_size(checkpoint, compressed.layouts, file_bytes=file_bytes)
    for size, directory in ((before, source), (after, compressed.directory)):
        expected = counted(directory, checkpoint.class_name, blocks)
        assert (size.num_parameters, size.num_parameters_without_embeddings) == expected
        assert size.file_bytes == (directory / "model.safetensors").stat().st_size
        assert size.ffn_bytes == 4 * size.ffn_elements
    assert before.num_parameters - after.num_parameters == before.ffn_elements - after.ffn_elements
    assert after.ffn_elements <= 0.3535 * before.ffn_elements


def test_the_bytes_of_a_half_precision_ffn(checkpoint_of: CheckpointFactory) -> None:
    import torch

    directory = checkpoint_of("llama", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    names = [name for ffn in checkpoint.ffns for name in ffn.tensor_names]
    size = original_size(checkpoint)
    assert size.ffn_bytes == sum(tensors[name].nbytes for name in names)
    assert size.ffn_elements == sum(tensors[name].numel() for name in names)


def test_keep_1_is_the_size_of_the_original(checkpoint_of: CheckpointFactory) -> None:
    checkpoint = open_checkpoint(checkpoint_of("bert"))
    size = original_size(checkpoint)
    dense = [LayerLayout.dense(shape) for shape in checkpoint.shapes]
    assert compressed_size(checkpoint, dense, file_bytes=size.file_bytes) == size
    assert Size.model_validate(json.loads(size.model_dump_json())) == size
