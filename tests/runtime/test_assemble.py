"""The checkpoint on disk: what is copied, what is replaced, and how it is cut into files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ffsplit.models.headers import INDEX_NAME
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.checkpoint_format import FORMAT_VERSION, FFNRun, runs_of
from tests.conftest import CheckpointFactory
from tests.runtime.compressed import compress, head_of, outputs, reference
from tests.runtime.conftest import CompressedFactory
from tests.tiny_models import FAMILIES


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


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


def test_the_tokenizer_and_the_licence_come_along_and_nothing_else(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint_of("bert", head=head_of("bert")), tmp_path / "source"))
    for name in ("LICENSE", "NOTICE.txt", "merges.txt", "chat_template.jinja", "pytorch_model.bin", "run.py"):
        (source / name).write_text(name)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (source / "unlisted").mkdir()
    (source / "unlisted" / "config.json").write_text("{}")
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    compressed = compress(source, tmp_path / "artifact", recipe="fast")
    kept = {str(path.relative_to(compressed.directory)) for path in compressed.directory.rglob("*.*")}
    assert {"NOTICE.txt", "merges.txt", "chat_template.jinja", "modules.json"} <= kept
    assert "1_Pooling/config.json" in kept and (compressed.directory / "LICENSE").read_text() == "LICENSE"
    assert not {"pytorch_model.bin", "run.py", "unlisted/config.json"} & kept
    tokenizer = (compressed.directory / "tokenizer.json").read_bytes()
    assert tokenizer == (source / "tokenizer.json").read_bytes()


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
