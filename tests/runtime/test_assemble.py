"""The checkpoint on disk: what is copied, what is replaced, and how it is cut into files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffsplit.errors import ArtifactError, FFSplitError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.models.tensor_files import INDEX_NAME
from ffsplit.runtime.assemble import assemble, replace_weights
from ffsplit.runtime.ffn_tensors import FORMAT_VERSION, FFNRun, runs_of
from tests.conftest import CheckpointFactory
from tests.runtime.compressed import compress, head_of, outputs, reference
from tests.runtime.conftest import CompressedFactory
from tests.tiny_models import FAMILIES


def files_below(directory: Path) -> dict[str, Path]:
    return {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.matrix()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["paper", "svd", "fast"])
def test_what_is_no_ffn_is_copied_bit_for_bit(
    compressed_of: CompressedFactory, family: str, recipe: str
) -> None:
    compressed = compressed_of(family, recipe=recipe)
    before, after = all_tensors(compressed.source.directory), all_tensors(compressed.directory)
    ffn = {name for each in compressed.source.ffns for name in each.tensor_names}
    assert all(torch.equal(after[name], before[name]) for name in before if name not in ffn)
    added = [name for name in after if name not in before]
    assert bool(added) == (not compressed.plain)
    elements = sum(after[name].numel() for name in {*added, *(ffn & after.keys())})
    num_guards = 0 if compressed.plain else 1
    shapes = compressed.source.shapes
    layouts = zip(compressed.layouts, shapes, strict=True)
    assert elements - num_guards == sum(layout.num_elements(shape) for layout, shape in layouts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_checkpoint_has_a_guard_in_its_first_layer(
    compressed_of: CompressedFactory, family: str
) -> None:
    compressed = compressed_of(family, recipe="svd")
    before, after = all_tensors(compressed.source.directory), all_tensors(compressed.directory)
    guards = [[name for name in ffn.tensor_names if name in after] for ffn in compressed.source.ffns]
    assert [len(names) for names in guards] == [1, 0, 0]
    assert after[guards[0][0]].shape == (1,) != before[guards[0][0]].shape


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_sharded_source_and_a_sharded_artifact(
    checkpoint_of: CheckpointFactory, tmp_path: Path, recipe: str
) -> None:
    source = checkpoint_of("llama", head="ForCausalLM", max_shard_size="30KB")
    assert (source / INDEX_NAME).is_file()
    limit = 40_000
    compressed = compress(source, tmp_path / "sharded", recipe=recipe, max_shard_bytes=limit)
    single = compress(source, tmp_path / "single", recipe=recipe)
    assert not (single.directory / INDEX_NAME).exists()
    index = json.loads((compressed.directory / INDEX_NAME).read_text())
    files = sorted(path.name for path in compressed.directory.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    for name in files:
        tensors = load_file(compressed.directory / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == tensors.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    tensors = all_tensors(compressed.directory)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    whole = all_tensors(single.directory)
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[name], whole[name]) for name in whole)
    model = load_whole_model(compressed.directory, "LlamaForCausalLM")
    torch.testing.assert_close(outputs(model), outputs(reference(compressed)), atol=1e-5, rtol=1e-4)
    assert torch.equal(outputs(load_whole_model(single.directory, "LlamaForCausalLM")), outputs(model))


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_the_bytes_repeat(checkpoint_of: CheckpointFactory, tmp_path: Path, recipe: str) -> None:
    source = checkpoint_of("bert", head=head_of("bert"))
    first, second = (compress(source, tmp_path / name, recipe=recipe).directory for name in ("a", "b"))
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}


def test_the_whole_folder_comes_along_but_for_other_weights(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint_of("bert", head=head_of("bert")), tmp_path / "source"))
    kept = ["LICENSE", "odd name.vocab", "run.py", "additional_chat_templates/tool_use.jinja", "a/b/c/d.xyz"]
    kept += ["1_Pooling/config.json", "2_Dense/config.json", "extra.safetensors"]
    left_out = ["pytorch_model.bin", "tf_model.h5", "onnx/config.json", "onnx/model.onnx", ".git/config"]
    for name in (*kept, *left_out, "README.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    compressed = compress(source, tmp_path / "artifact", recipe="fast")
    found, there = files_below(compressed.directory), files_below(source)
    assert found.keys() == (there.keys() - {*left_out, "README.md"}) | {"README.original.md"}
    for name in (*kept, "2_Dense/model.safetensors", "tokenizer.json"):
        assert found[name].read_bytes() == there[name].read_bytes()
    assert found["README.original.md"].read_text() == "README.md"


def test_a_file_that_changes_during_the_run_is_named(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint_of("bert", head=head_of("bert")), tmp_path / "source"))
    checkpoint = open_checkpoint(source)
    layouts = [LayerLayout.dense(shape) for shape in checkpoint.shapes]
    assemble(checkpoint, [], layouts, tmp_path / "first")
    for name in ("tokenizer.json", "model.safetensors"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data + b" ")
        with pytest.raises(ArtifactError, match=f"{name} changed during the run"):
            assemble(checkpoint, [], layouts, tmp_path / "second")
        (source / name).unlink()
        with pytest.raises(FFSplitError, match=name):
            assemble(checkpoint, [], layouts, tmp_path / "third")
        (source / name).write_bytes(data)
        checkpoint = open_checkpoint(source)


def test_healed_weights_leave_what_came_along_alone(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"v": torch.zeros(2)}, tmp_path / "extra.safetensors", {"kept": "as it was"})
    before = (tmp_path / "extra.safetensors").read_bytes()
    save_file({"w": torch.ones(2)}, tmp_path / "healed")
    replace_weights(tmp_path, tmp_path / "healed")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.ones(2))
    assert (tmp_path / "extra.safetensors").read_bytes() == before


def test_a_plain_config_changes_its_width_alone(compressed_of: CompressedFactory) -> None:
    for family, field in (("bert", "intermediate_size"), ("distilbert", "hidden_dim"), ("opt", "ffn_dim")):
        compressed = compressed_of(family, recipe="fast")
        config = json.loads((compressed.directory / "config.json").read_text())
        assert config == compressed.source.config | {field: compressed.layouts[0].num_neurons}


def test_a_split_config_keeps_the_original_and_carries_the_layouts(compressed_of: CompressedFactory) -> None:
    compressed = compressed_of("bert", recipe="paper")
    config = json.loads((compressed.directory / "config.json").read_text())
    split = config.pop("quantization_config")
    assert config == compressed.source.config
    assert split["quant_method"] == "ffsplit" and split["version"] == FORMAT_VERSION
    shapes = compressed.source.shapes
    assert split["ffns"] == [run.model_dump(mode="json") for run in runs_of(compressed.layouts, shapes)]
    runs = [FFNRun.model_validate(run) for run in split["ffns"]]
    assert [run.layout for run in runs for _ in range(run.count)] == list(compressed.layouts)
