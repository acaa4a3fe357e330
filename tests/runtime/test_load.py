"""A compressed checkpoint loaded through transformers equals the model that was compressed in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ffsplit  # noqa: F401  (registers the split format with transformers)
from ffsplit.errors import ArtifactError, UnsupportedModelError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.recipes import shipped_recipes
from ffsplit.recipes.recipe import load_recipe
from ffsplit.runtime.modules import SplitFFN
from tests.conftest import CheckpointFactory
from tests.runtime.compressed import compress, head_of, outputs, reference
from tests.runtime.conftest import CompressedFactory
from tests.tiny_models import FAMILIES, model_class

RECIPES = sorted(set(shipped_recipes()) - {"demo", "best", "tiny", "int8"})  # whose steps are those of "fast"
HEADS = [
    ("bert", ""),
    ("bert", "ForMaskedLM"),
    ("bert", "ForTokenClassification"),
    ("roberta", "ForMaskedLM"),
    ("electra", "ForQuestionAnswering"),
    ("distilbert", ""),
    ("distilbert", "ForMaskedLM"),
    ("opt", ""),
    ("opt", "ForSequenceClassification"),
    ("llama", ""),
    ("llama", "ForSequenceClassification"),
    ("qwen3", "ForTokenClassification"),
]


PLAIN = ("fast", "refit", "experts", "norm-prune", "demo", "split")
"""Recipes whose steps have a plain result whatever the family; what follows them is not computed here."""


def dense_outputs(directory: Path, class_name: str) -> torch.Tensor:
    return outputs(load_whole_model(directory, class_name))


@pytest.mark.matrix()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_the_reference(compressed_of: CompressedFactory, family: str, recipe: str) -> None:
    compressed = compressed_of(family, recipe=recipe)
    has_bias = compressed.source.shapes[0].down_bias
    assert compressed.plain == (recipe in PLAIN or (recipe == "flap" and has_bias))
    model = model_class(family, head_of(family)).from_pretrained(compressed.directory).eval()
    found = outputs(model)
    torch.testing.assert_close(found, outputs(reference(compressed)), atol=1e-5, rtol=1e-4)
    dense = dense_outputs(compressed.source.directory, compressed.source.class_name)
    assert (found - dense).abs().max() > 1e-3, "the test could not tell it from the dense model"


@pytest.mark.parametrize("family", FAMILIES)
def test_automodel_loads_the_base_model(compressed_of: CompressedFactory, family: str) -> None:
    compressed = compressed_of(family, recipe="paper")
    base = transformers.AutoModel.from_pretrained(compressed.directory).eval()
    expected = reference(compressed)
    expected = getattr(expected, expected.base_model_prefix)
    torch.testing.assert_close(outputs(base), outputs(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.matrix()
@pytest.mark.parametrize(("family", "head"), HEADS)
@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_other_task_heads(compressed_of: CompressedFactory, family: str, head: str, recipe: str) -> None:
    compressed = compressed_of(family, recipe=recipe, head=head)
    model = load_whole_model(compressed.directory, compressed.source.class_name)
    assert type(model).__name__.endswith(head or "Model")
    torch.testing.assert_close(outputs(model), outputs(reference(compressed)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "llama"])
@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_no_tensor_is_missing_or_unexpected(
    compressed_of: CompressedFactory, family: str, recipe: str
) -> None:
    compressed = compressed_of(family, recipe=recipe)
    _, info = model_class(family, head_of(family)).from_pretrained(
        compressed.directory, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.matrix()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_keep_1_is_the_original_byte_for_byte(
    compressed_of: CompressedFactory, family: str, recipe: str
) -> None:
    compressed = compressed_of(family, recipe=recipe, keep=1.0)
    assert compressed.plain
    before, after = (
        load_file(directory / "model.safetensors")
        for directory in (compressed.source.directory, compressed.directory)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8)), name
    found = dense_outputs(compressed.directory, compressed.source.class_name)
    assert torch.equal(found, dense_outputs(compressed.source.directory, compressed.source.class_name))


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "llama", "qwen3"])
@pytest.mark.parametrize("recipe", ["svd", "paper"])
def test_save_pretrained_and_load_again(
    compressed_of: CompressedFactory, family: str, recipe: str, tmp_path: Path
) -> None:
    compressed = compressed_of(family, recipe=recipe)
    model = load_whole_model(compressed.directory, compressed.source.class_name)
    model.save_pretrained(tmp_path)
    again = load_whole_model(tmp_path, compressed.source.class_name)
    assert torch.equal(outputs(again), outputs(model))
    first, second = (load_file(each / "model.safetensors") for each in (compressed.directory, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_different_widths(compressed_of: CompressedFactory, family: str, tmp_path: Path) -> None:
    """No stock model has a width of its own for each layer; names and modules stay the original's."""
    compressed = compressed_of(family, recipe="fast", keep=(0.5, 0.25, 1.0))
    assert not compressed.plain
    model = load_whole_model(compressed.directory, compressed.source.class_name)
    assert not any(isinstance(module, SplitFFN) for module in model.modules())
    torch.testing.assert_close(outputs(model), outputs(reference(compressed)), atol=1e-5, rtol=1e-4)
    first = load_file(compressed.directory / "model.safetensors")
    assert first.keys() == compressed.source.tensors.keys()
    model.save_pretrained(tmp_path)
    second = load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = load_whole_model(tmp_path, compressed.source.class_name)
    assert torch.equal(outputs(again), outputs(model))


def test_a_config_of_fewer_ffns_than_the_model_has_is_refused(
    compressed_of: CompressedFactory, tmp_path: Path
) -> None:
    compressed = compressed_of("bert", recipe="paper")
    shutil.copytree(compressed.directory, tmp_path / "damaged")
    file = tmp_path / "damaged" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["ffns"][0]["count"] -= 1
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"describes 2 split FFNs, the model has 3"):
        transformers.AutoModel.from_pretrained(tmp_path / "damaged")


def test_a_narrowed_checkpoint_is_no_model_to_start_from(compressed_of: CompressedFactory) -> None:
    directory = compressed_of("bert", recipe="fast", keep=(0.5, 0.25, 1.0)).directory
    with pytest.raises(UnsupportedModelError, match="start from the original"):
        open_checkpoint(directory)
    checkpoint = open_checkpoint(directory, uneven=True)
    assert len({shape.num_neurons for shape in checkpoint.shapes}) == 3


@pytest.mark.matrix(pairs=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("recipe", "keep"), [("paper", 0.3535), ("fast", 0.3535), ("svd", 1.0)])
def test_the_checkpoints_dtype_is_kept(
    checkpoint_of: CheckpointFactory,
    tmp_path: Path,
    dtype: torch.dtype,
    family: str,
    recipe: str,
    keep: float,
) -> None:
    source = checkpoint_of(family, head=head_of(family), dtype=dtype)
    compressed = compress(source, tmp_path / "artifact", recipe=recipe, keep=keep)
    tensors = load_file(compressed.directory / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    if keep == 1.0:
        original = load_file(source / "model.safetensors")
        assert all(torch.equal(tensors[name], original[name]) for name in original)
    class_name = compressed.source.class_name
    model = load_whole_model(compressed.directory, class_name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert outputs(model).isfinite().all()
    model = load_whole_model(compressed.directory, class_name, dtype=torch.float32)
    torch.testing.assert_close(outputs(model), outputs(reference(compressed)), atol=0.1, rtol=0.05)


def test_a_float64_checkpoint_is_refused_or_kept_to_the_last_bit(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint_of("bert", dtype=torch.float64)
    try:
        compressed = compress(source, tmp_path / "artifact", recipe="fast", keep=1.0)
    except UnsupportedModelError:
        return
    before, after = (load_file(each / "model.safetensors") for each in (source, compressed.directory))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_compressed_model_trains(compressed_of: CompressedFactory, recipe: str) -> None:
    """Every weight of a split FFN gets a gradient, so that the result can be fine-tuned."""
    compressed = compressed_of("bert", recipe=recipe)
    model: Any = load_whole_model(compressed.directory, compressed.source.class_name)
    model(input_ids=torch.arange(5, 25).reshape(2, 10)).logits.square().sum().backward()
    blocks = {name: value for name, value in model.named_parameters() if ".layer." in name}
    assert all(value.grad is not None and value.grad.any() for value in blocks.values())
    assert recipe == "fast" or model.hf_quantizer.is_trainable  # transformers' Trainer asks


def test_demo_takes_the_steps_of_fast() -> None:
    """So that the tests above, which leave it out, hold for it too."""
    demo, fast = load_recipe("demo"), load_recipe("fast")
    kinds = [[step.kind for step in recipe.steps] for recipe in (demo, fast)]
    assert (kinds[0], demo.heavy_share, demo.score) == (kinds[1], fast.heavy_share, fast.score)
