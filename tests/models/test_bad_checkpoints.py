"""Every bad model is refused in one line that says what, where and how to mend it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.models import tensor_files as contents
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_processor, load_tokenizer, load_whole_model
from ffsplit.models.tensor_files import INDEX_NAME
from ffsplit.run.checks import check_vocabulary
from ffsplit.runtime.ffn_tensors import load_output_norm
from tests.conftest import CheckpointFactory
from tests.tiny_models import FAMILIES

FFN_UP = "encoder.layer.1.intermediate.dense.weight"
FFN_DOWN = "encoder.layer.1.output.dense.weight"


@pytest.fixture
def bert(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "bert"))


def refused(directory: Path, kind: type[ConfigError] = ConfigError) -> str:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(directory)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


def configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_no_config(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} is not a model: it has no config.json"


@pytest.mark.parametrize(("text", "complaint"), [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_a_config_that_is_none(bert: Path, text: str, complaint: str) -> None:
    (bert / "config.json").write_text(text)
    assert complaint in refused(bert)


def test_a_config_that_is_not_text(bert: Path) -> None:
    (bert / "config.json").write_bytes(b"\xff\xfe\x00binary")
    assert "config.json is not JSON" in refused(bert)


@pytest.mark.parametrize("model_type", ["made-up", None, 3, ["bert"]])
def test_an_unknown_model_type_lists_the_known_ones(bert: Path, model_type: object) -> None:
    configure(bert, model_type=model_type)
    message = refused(bert, UnsupportedModelError)
    assert f"model type {model_type!r} is not supported" in message
    assert all(family in message for family in FAMILIES)


def test_no_weights(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(bert)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_alone(bert: Path, name: str) -> None:
    (bert / "model.safetensors").rename(bert / name)
    message = refused(bert)
    assert "only pickled weights" in message and "save_pretrained" in message


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(bert: Path, fraction: float) -> None:
    path = bert / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    assert f"{path} is not a whole safetensors file" in refused(bert)


def test_already_quantized(bert: Path) -> None:
    configure(bert, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already compressed or quantized" in refused(bert, UnsupportedModelError)


def test_integer_weights_are_no_ffn_to_split(bert: Path) -> None:
    """Weights quantized by hand, with no word of it in the config."""
    path = bert / "model.safetensors"
    tensors = {
        name: tensor.mul(10).to(torch.int8) if "dense.weight" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    assert "dense.weight" in refused(bert, UnsupportedModelError)


@pytest.mark.parametrize("name", [FFN_UP, FFN_DOWN])
def test_a_layer_without_an_ffn_tensor(bert: Path, name: str) -> None:
    path = bert / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    assert name in refused(bert, UnsupportedModelError)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_without_a_tensor_of_the_norm_after_its_ffn(bert: Path, name: str) -> None:
    path, missing = bert / "model.safetensors", f"encoder.layer.1.output.LayerNorm.{name}"
    tensors = load_file(path)
    del tensors[missing]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"{bert} has no tensor {missing}"):
        load_output_norm(open_checkpoint(bert), 1, device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "llama"])
def test_a_checkpoint_that_lacks_its_last_layer(
    checkpoint_of: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    """As an interrupted conversion leaves it; transformers would make the layer up at random."""
    directory = Path(shutil.copytree(checkpoint_of(family), tmp_path / family))
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".2." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    assert ".2." in refused(directory, UnsupportedModelError)


def test_an_ffn_tensor_that_is_no_matrix(bert: Path) -> None:
    path = bert / "model.safetensors"
    tensors = load_file(path)
    tensors[FFN_UP] = tensors[FFN_UP].flatten()
    save_file(tensors, path, {"format": "pt"})
    assert FFN_UP in refused(bert, UnsupportedModelError)


def test_weights_of_something_else(bert: Path) -> None:
    save_file({"weight": torch.zeros(3)}, bert / "model.safetensors")
    assert "where a bert keeps its first FFN" in refused(bert, UnsupportedModelError)


def sharded(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Path:
    source = checkpoint_of("llama", max_shard_size="30KB")
    return Path(shutil.copytree(source, tmp_path / "sharded"))


def test_an_index_that_names_an_absent_tensor(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    directory = sharded(checkpoint_of, tmp_path)
    index = json.loads((directory / INDEX_NAME).read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["layers.9.ghost"] = file
    (directory / INDEX_NAME).write_text(json.dumps(index))
    assert f"names layers.9.ghost, which {file} does not hold" in refused(directory)


def test_an_index_that_names_an_absent_file(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    directory = sharded(checkpoint_of, tmp_path)
    file = sorted(directory.glob("model-*.safetensors"))[1]
    file.unlink()
    assert refused(directory) == f"{file} is missing"


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_index_without_a_map(checkpoint_of: CheckpointFactory, tmp_path: Path, text: str) -> None:
    directory = sharded(checkpoint_of, tmp_path)
    (directory / INDEX_NAME).write_text(text)
    assert "weight_map" in refused(directory)


def test_an_index_without_metadata(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    """transformers does not load it."""
    directory = sharded(checkpoint_of, tmp_path)
    index = json.loads((directory / INDEX_NAME).read_text())
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert 'has no metadata: add "metadata": {} to it' in refused(directory)


@pytest.mark.parametrize("stated", ["3", 3.0, 0])
def test_a_number_of_layers_that_is_none(bert: Path, stated: object) -> None:
    configure(bert, num_hidden_layers=stated)
    said = refused(bert, UnsupportedModelError)
    assert f"config.json says num_hidden_layers {stated!r}, the tensors have 3" in said


def test_an_ffn_that_is_no_matrix(bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    save_file(tensors | {FFN_DOWN: tensors[FFN_DOWN].flatten()}, bert / "model.safetensors", {"format": "pt"})
    assert f"{FFN_DOWN} is missing or not a matrix" in refused(bert, UnsupportedModelError)


def test_tensors_of_integers_are_digested_and_not_looked_at(tmp_path: Path) -> None:
    """Their bytes would be NaN as floats."""
    path = tmp_path / "a.safetensors"
    save_file({"ids": torch.full((8,), -1), "weight": torch.ones(3)}, path)
    expected = hashlib.sha256(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    assert contents.digest_files(tmp_path, [path.name]) == expected.hexdigest()


def test_no_tokenizer(bert: Path) -> None:
    for path in bert.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer") as caught:
        load_tokenizer(open_checkpoint(bert))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"type": "Nothing"}}'])
def test_a_broken_tokenizer(bert: Path, text: str) -> None:
    (bert / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="has no tokenizer") as caught:
        load_tokenizer(open_checkpoint(bert))
    assert "\n" not in str(caught.value)


ODD_TOKENIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "of a newer tokenizers": ("tokenizer.json", {"pre_tokenizer": {"type": "OfTheFuture"}}),
    "a token for a list": ("tokenizer_config.json", {"extra_special_tokens": "<|a|>"}),
    "tokens as objects": (
        "tokenizer_config.json",
        {"additional_special_tokens": [{"content": "<|b|>", "special": True}], "extra_special_tokens": None},
    ),
    "a number for a token": ("tokenizer_config.json", {"pad_token": 3}),
    "no class by that name": ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
}


@pytest.mark.parametrize("name", ODD_TOKENIZERS)
def test_a_tokenizer_that_this_version_does_not_read(bert: Path, name: str) -> None:
    """Whatever the library raises of it: a bare Exception, TypeErrors, AttributeErrors."""
    file, fields = ODD_TOKENIZERS[name]
    path = bert / file
    stated = {key: value for key, value in json.loads(path.read_text()).items() if key not in fields}
    stated |= {key: value for key, value in fields.items() if value is not None}
    path.write_text(json.dumps(stated))
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(open_checkpoint(bert))
    message = str(caught.value)
    assert message.startswith(f"{bert} has no tokenizer that loads: ") and "\n" not in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "content", ['{"image_processor_type": "ViTImageProcessor", "size": "small"}', '{"a": []}', "[]", "{"]
)
def test_a_processor_that_does_not_load(bert: Path, content: str) -> None:
    (bert / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match="has no image processor that loads") as caught:
        load_processor(open_checkpoint(bert), "image")
    assert "\n" not in str(caught.value)


def test_deeply_nested_json(bert: Path) -> None:
    (bert / "config.json").write_text("[" * 100_000)
    assert "config.json is not JSON" in refused(bert)


def test_a_class_that_transformers_has_not(bert: Path) -> None:
    with pytest.raises(ConfigError, match="has no class BertForEverything"):
        load_whole_model(bert, "BertForEverything")


def test_a_tokenizer_of_another_model(bert: Path) -> None:
    configure(bert, vocab_size=50)
    checkpoint = open_checkpoint(bert)
    with pytest.raises(ConfigError, match=r"does not belong to the model.* below 50") as caught:
        check_vocabulary(load_tokenizer(checkpoint), checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinite numbers")])
def test_weights_that_are_not_finite_are_named(
    bert: Path, value: float, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a tensor they are, and without holding it."""
    monkeypatch.setattr(contents, "CHUNK_BYTES", 64)
    path = bert / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    tensors["encoder.layer.1.output.dense.bias"][-1] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ConfigError, match=rf"tensor encoder\.layer\.1\.output\.dense\.bias holds {kind}"
    ) as caught:
        open_checkpoint(bert).model_digest()
    assert "\n" not in str(caught.value) and str(bert) in str(caught.value)


def test_a_digest_is_of_every_byte(bert: Path) -> None:
    expected = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        content = (bert / name).read_bytes()
        expected.update(f"{name}\0{len(content)}\0".encode() + content)
    assert open_checkpoint(bert).model_digest() == expected.hexdigest()
