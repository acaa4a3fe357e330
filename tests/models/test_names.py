"""Names in files and names of modules: what headers promise is what transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.compat.transformers import ReadTensor, names_read
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import check_complete, check_names, load_whole_model
from ffsplit.models.names import TensorNames, below_base, empty_class
from ffsplit.run.stages.heal import check_written, stored_tensors
from tests.conftest import CheckpointFactory
from tests.test_odd_checkpoints import LEGACY, configure, renamed, rewrite
from tests.tiny_families import ROWS, heads_of, make_model, save_checkpoint
from tests.tiny_models import random_rows

WITH_HEADS = [(name, head) for name in ROWS for head in ("", *heads_of(name))]


@pytest.mark.matrix()
@pytest.mark.parametrize(("family", "head"), WITH_HEADS)
def test_the_rules_of_every_row_are_those_of_transformers(tmp_path: Path, family: str, head: str) -> None:
    """`check_complete` holds the tensors of all blocks against what transformers reads them as."""
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, family, head))
    check_complete(checkpoint)
    assert checkpoint.read is None or (family, head) == ("siglip", "ForImageClassification"), "headers tell"
    model = empty_class(tmp_path, checkpoint.class_name)
    read = names_read(model, checkpoint.tensors)
    assert all(each is not None for each in read.values())
    for module, stored in checkpoint.names.modules.items():
        found = read[stored]
        assert found is not None
        if found.is_whole and stored in checkpoint.names_in_blocks:
            assert below_base(model, found.name) == module.removeprefix(checkpoint.prefix)
        assert checkpoint.names.stored(module) == stored


def test_names_go_both_ways() -> None:
    rules = (("layers.", "encoder.layer."), ("mlp.fc2", "output.dense"))
    files = ["vit.encoder.layer.0.output.dense.weight", "vit.norm.LayerNorm.gamma", "vit.encoder.layer.1.x"]
    names = TensorNames(files, rules=rules)
    assert names.modules == {
        "vit.layers.0.mlp.fc2.weight": "vit.encoder.layer.0.output.dense.weight",
        "vit.norm.LayerNorm.weight": "vit.norm.LayerNorm.gamma",
        "vit.layers.1.x": "vit.encoder.layer.1.x",
    }
    assert all(names.stored(module) == stored for module, stored in names.modules.items())
    assert names.stored("vit.layers.7.mlp.fc2.weight") == "vit.encoder.layer.7.output.dense.weight"
    assert names.stored("LayerNorm.weight") == "LayerNorm.weight", "what is new gets no old name"


def test_the_first_of_two_stored_tensors_counts(tmp_path: Path) -> None:
    """Transformers reads `gamma` where both are there."""
    save_checkpoint(tmp_path, "bert")
    both = {
        old: 3 + tensor for old, tensor in renamed(*LEGACY)(load_file(tmp_path / "model.safetensors")).items()
    }
    rewrite(tmp_path, lambda tensors: both | tensors)
    checkpoint = open_checkpoint(tmp_path)
    stored = checkpoint.in_base("encoder.layer.0.output.LayerNorm.weight")
    assert stored == "encoder.layer.0.output.LayerNorm.gamma"
    model = load_whole_model(tmp_path, "BertModel")
    with torch.no_grad():
        assert torch.equal(
            model.encoder.layer[0].output.LayerNorm.weight, load_file(tmp_path / "model.safetensors")[stored]
        )


def test_what_transformers_ignores_has_no_module() -> None:
    read = {"a.weight": ReadTensor("x.a.weight", "a.weight", True), "b.weight": None}
    assert TensorNames(read, rules=(), read=read).modules == {"a.weight": "a.weight"}


def test_what_headers_promise_wrongly_is_refused(checkpoint_of: CheckpointFactory) -> None:
    checkpoint = open_checkpoint(checkpoint_of("bert"))
    model = empty_class(checkpoint.directory, "BertModel")
    check_names(checkpoint, model)
    ffn = checkpoint.ffns[0].up.name
    swapped = {ffn: ReadTensor(ffn, "encoder.layer.0.intermediate.other.weight", True)}
    with pytest.raises(
        UnsupportedModelError, match=f"{ffn} would be compressed, but transformers reads it as"
    ):
        check_names(replace(checkpoint, read=swapped), model)
    with pytest.raises(
        UnsupportedModelError,
        match=r"intermediate\.dense\.bias would be compressed, but transformers ignores it",
    ):
        check_names(checkpoint, make_model("gpt2"))


@contextmanager
def registered(rule: WeightRenaming | WeightConverter) -> Iterator[None]:
    """A rule for the files of a BertModel, in transformers' own register."""
    conversion_mapping.register_checkpoint_conversion_mapping("BertModel", [rule])
    yield
    assert conversion_mapping._checkpoint_conversion_mapping_cache is not None
    del conversion_mapping._checkpoint_conversion_mapping_cache["BertModel"]
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("BertModel")


@pytest.fixture
def fused_queries() -> Iterator[None]:
    """A BERT whose files have queries, keys and values in one tensor."""
    attention = "attention.self."
    parts = [f"{attention}{name}.weight" for name in ("query", "key", "value")]
    with registered(WeightConverter(f"{attention}qkv.weight", parts, operations=[Chunk(dim=0)])):
        yield


def test_a_name_that_is_the_models_own_is_not_renamed(tmp_path: Path) -> None:
    """Where what it would become is not."""
    save_checkpoint(tmp_path, "bert")
    name = "encoder.layer.0.intermediate.dense.weight"
    with registered(WeightRenaming("intermediate", "inner")):
        read = names_read(make_model("bert"), [name, "encoder.layer.0.intermediate.other"])
        model = load_whole_model(tmp_path, "BertModel", dtype=torch.float32)
    assert read == {
        name: ReadTensor(name, name, is_whole=True),
        "encoder.layer.0.intermediate.other": None,
    }
    stored = load_file(tmp_path / "model.safetensors")[name]
    assert torch.equal(model.encoder.layer[0].intermediate.dense.weight, stored)


def test_a_class_that_transformers_does_not_have(tmp_path: Path) -> None:
    assert empty_class(tmp_path, "MadeUpForNothing") is None


def test_what_is_trained_and_cannot_be_written_is_an_error(tmp_path: Path, fused_queries: None) -> None:
    save_checkpoint(tmp_path, "bert")
    assert "encoder.layer.0.attention.self.qkv.weight" in load_file(tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    check_complete(checkpoint)
    student = load_whole_model(tmp_path, "BertModel", dtype=torch.float32)
    batch = next(padded_batches(random_rows(1), batch_tokens=32, pad_id=0))
    with pytest.raises(
        UnsupportedModelError, match=r"healing would train .*query\.weight \(6 such tensors\)"
    ):
        check_written(student, checkpoint, batch, makes="states")
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert", "deberta-v2", "gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("with_head", [False, True])
def test_whatever_is_trained_is_written(tmp_path: Path, family: str, with_head: bool) -> None:
    """Every parameter of the model that a gradient reaches comes back from the file."""
    head = heads_of(family)[-1 if with_head else 0] if with_head or family == "gemma3" else ""
    save_checkpoint(tmp_path, family, head)
    if "LayerNorm" in str(list(load_file(tmp_path / "model.safetensors"))):
        rewrite(tmp_path, renamed(*LEGACY))
    checkpoint = open_checkpoint(tmp_path)
    student = load_whole_model(tmp_path, checkpoint.class_name, dtype=torch.float32)
    batch = next(padded_batches(random_rows(1), batch_tokens=32, pad_id=0))
    check_written(student, checkpoint, batch, makes=checkpoint.compared_as)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    save_file(stored_tensors(student, checkpoint), tmp_path / "model.safetensors", {"format": "pt"})
    again = load_whole_model(tmp_path, checkpoint.class_name, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in student.state_dict().items())


def test_a_pooler_that_was_made_up_is_not_trained(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert")
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "pooler" not in n})
    checkpoint = open_checkpoint(tmp_path)
    student = load_whole_model(tmp_path, "BertModel", dtype=torch.float32)
    batch = next(padded_batches(random_rows(1), batch_tokens=32, pad_id=0))
    check_written(student, checkpoint, batch, makes="states")
    assert any("pooler" in name for name, _ in student.named_parameters())
    assert not any("pooler" in name for name in stored_tensors(student, checkpoint))
    assert all(parameter.grad is None for parameter in student.parameters())  # it looked, and left no trace


def test_a_class_that_makes_nothing_of_the_config_is_said(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "t5", "ForConditionalGeneration")
    configure(tmp_path, architectures=["T5ForTokenClassification"], d_kv="wide")
    with pytest.raises(
        UnsupportedModelError, match="transformers cannot build T5ForTokenClassification from"
    ):
        open_checkpoint(tmp_path)


def test_a_bias_is_split_with_its_matrix() -> None:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, use_swiglu_ffn=True, image_size=28
    )
    model = transformers.Dinov2Model(config)
    kinds = ("weight", "bias")
    stored = [f"encoder.layer.0.mlp.weights_in.{kind}" for kind in kinds]
    found = names_read(model, stored)
    for kind, name in zip(kinds, stored, strict=True):
        read = found[name]
        assert read is not None
        assert [each.rpartition("mlp.")[2] for each in read.rows_of] == [
            f"gate_proj.{kind}",
            f"up_proj.{kind}",
        ]
