"""A folder that is no model is told what it is and what to do, in one line, before any write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffsplit.cli import main
from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.models import not_a_model as recognise
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import locate_model
from ffsplit.models.not_a_model import check_tokenizer_library
from ffsplit.run.checks import check_vocabulary
from tests.conftest import CheckpointFactory
from tests.tiny_models import save_checkpoint


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "bert", "bert")


def refused(directory: Path | str, kind: type[ConfigError] = ConfigError) -> str:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(locate_model(str(directory)).directory)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_says_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    arguments = ["compress", str(tmp_path / "lora"), "--out", str(tmp_path / "out"), "--runner", "serial"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is an adapter of org/base, not a whole model: merge it" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_adapter_whose_base_is_not_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    assert f"{tmp_path} is an adapter, not a whole model: merge it into its base" in refused(tmp_path)


def test_an_adapter_beside_whole_weights(bert: Path) -> None:
    (bert / "adapter_config.json").write_text("{}")
    (bert / "adapter_model.safetensors").write_text("")
    assert "holds an adapter beside whole weights" in refused(bert)
    assert "merge it into its base" in refused(bert) and "or remove adapter_config.json" in refused(bert)


def test_a_transformer_in_a_folder_of_its_own(bert: Path, tmp_path: Path) -> None:
    """As sentence-transformers saved it once, with and without a config.json above."""
    old = tmp_path / "old"
    shutil.copytree(bert, old / "0_Transformer")
    (old / "modules.json").write_text(
        json.dumps(
            [{"path": "0_Transformer", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
        )
    )
    expected = "whose transformer is in 0_Transformer/: save it again with SentenceTransformer"
    assert expected in refused(old)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(bert / name, old / name)
    assert expected in refused(old)


def test_what_the_advice_for_it_gives_is_a_model(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(bert, old / "0_Transformer")
    words = Transformer(str(bert))
    (old / "1_Pooling").mkdir()
    Pooling(words.get_embedding_dimension(), "mean").save(str(old / "1_Pooling"))
    types = "sentence_transformers.models."
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    (old / "modules.json").write_text(
        json.dumps(
            [
                {"idx": index, "name": str(index), "path": path, "type": types + kind}
                for index, (path, kind) in enumerate(modules)
            ]
        )
    )
    assert "0_Transformer" in refused(old)
    SentenceTransformer(str(old)).save_pretrained(str(new))
    assert open_checkpoint(new).makes == "states"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "odd name.pt"])
def test_a_module_whose_weights_are_a_pickle(bert: Path, name: str) -> None:
    (bert / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense", "type": "x.Dense"}]))
    (bert / "2_Dense").mkdir()
    for each in ("config.json", name):
        (bert / "2_Dense" / each).write_text("{}")
    message = refused(bert)
    assert f"2_Dense/{name}: this module's only weights are not safetensors" in message
    assert "save_pretrained" in message
    save_file({"linear.weight": torch.ones(2, 2)}, bert / "2_Dense" / "model.safetensors")
    assert "2_Dense/model.safetensors" in open_checkpoint(bert).folder.files.companions


@pytest.mark.parametrize("text", ["{", "{}", "[3]"])
def test_a_list_of_modules_that_is_none(bert: Path, text: str) -> None:
    (bert / "modules.json").write_text(text)
    assert refused(bert) == f"{bert}/modules.json is not a list of modules"


def test_a_hub_cache_and_what_lies_in_it(bert: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--some-name"
    shutil.copytree(bert, repository / "snapshots" / "0123")
    snapshot = f"{repository}/snapshots/0123"
    for directory in (repository, repository / "snapshots"):
        expected = f"{directory} is the hub's cache of org/some-name: give that id, or a snapshot, {snapshot}"
        assert refused(directory) == expected
    expected = f"{tmp_path}/hub is a cache of the hub: give the id of a model, such as org/some-name"
    assert refused(tmp_path / "hub") == expected
    assert open_checkpoint(locate_model(snapshot).directory).makes == "states"


def test_links_in_a_folder_that_is_no_model_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "up").symlink_to(".")
    (tmp_path / "gone").symlink_to("nowhere")
    assert refused(tmp_path) == f"{tmp_path} is not a model: it has no config.json"


def test_models_below_a_folder_are_named(bert: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        shutil.copytree(bert, tmp_path / "zoo" / name)
    message = refused(tmp_path / "zoo")
    assert (
        f"these folders below it do: {tmp_path}/zoo/a, {tmp_path}/zoo/b, {tmp_path}/zoo/c and 1 more"
        in message
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "holds model.gguf and no config.json"),
        ("notes.txt", "is not a model: it has no config.json"),
    ],
)
def test_no_config(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("")
    assert said in refused(tmp_path)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_weights_in_another_format_alone(bert: Path, name: str) -> None:
    (bert / "model.safetensors").rename(bert / name)
    assert f"holds its weights only as {name}: convert them to safetensors" in refused(bert)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/name@main", "give org/name with --revision main"),
        ("name@v1.0", "give name with --revision v1.0"),
        ("hf:org/name", "give org/name"),
        ("hf://org/name@refs/pr/1", "give org/name with --revision refs/pr/1"),
        ("https://huggingface.co/org/name", "give org/name"),
        ("https://huggingface.co/org/name/tree/main", "give org/name with --revision main"),
        ("https://huggingface.co/org/name/blob/v2/config.json", "give org/name with --revision v2"),
    ],
)
def test_almost_a_hub_id(model: str, said: str) -> None:
    assert refused(model) == f"model {model} is neither a directory nor a hub id: {said}"


def quantized(directory: Path, tensor: str) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    base = "encoder.layer.0.output.dense."
    tensors[base + tensor] = tensors.pop(f"{base}weight").to(torch.int32)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: quantized(path, "qweight"), "GPTQ or AWQ: tensor"),
        (lambda path: quantized(path, "weight_packed"), "compressed-tensors: tensor"),
        (lambda path: quantized(path, "SCB"), "bitsandbytes: tensor"),
        (
            lambda path: configure(path, compression_config={"config_groups": {}}),
            "compressed-tensors: compression_config in config.json",
        ),
        (lambda path: configure(path, quantization={"bits": 4}), "MLX: quantization in config.json"),
    ],
)
def test_weights_that_were_quantized_by_an_older_tool(
    bert: Path, make: Callable[[Path], None], said: str
) -> None:
    make(bert)
    message = refused(bert, UnsupportedModelError)
    assert f"{bert} is quantized already ({said}" in message and "start from the original" in message


def configure(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_a_sparse_checkpoint_that_is_stored_dense_is_a_model(bert: Path) -> None:
    configure(bert, compression_config={"format": "dense"})
    assert open_checkpoint(bert).makes == "states"


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["BertModel"], 'add "model_type": "bert"'),
        (["Unheard"], "add its family"),
        (None, "add its family"),
        (3, "add its family"),
    ],
)
def test_a_config_without_a_model_type(bert: Path, classes: object, said: str) -> None:
    config = json.loads((bert / "config.json").read_text())
    del config["model_type"]
    (bert / "config.json").write_text(json.dumps(config | {"architectures": classes}))
    message = refused(bert, UnsupportedModelError)
    assert "config.json names no model_type" in message and said in message


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_vocabulary_that_sentencepiece_alone_reads(bert: Path, name: str) -> None:
    from ffsplit.models.load import load_tokenizer

    (bert / "tokenizer.json").unlink()
    (bert / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ConfigError, match=rf"{name} needs sentencepiece, .*pip install sentencepiece"):
        load_tokenizer(open_checkpoint(bert))


def test_a_tokenizer_without_its_vocabulary(checkpoint_of: CheckpointFactory, bert: Path) -> None:
    """transformers makes one of special tokens, in which every word is unknown."""
    from ffsplit.models.load import load_tokenizer

    (bert / "tokenizer.json").unlink()
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    checkpoint = open_checkpoint(bert)
    with pytest.raises(ConfigError, match="has no tokenizer: its vocabulary is missing"):
        check_vocabulary(load_tokenizer(checkpoint), checkpoint)


def test_a_vocabulary_that_is_read_without_sentencepiece_is_let_through(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or that is installed, or the file is of another format."""
    (bert / "tokenizer.json").unlink()
    (bert / "spiece.model").write_bytes(b"\n\x0e")
    monkeypatch.setattr(recognise, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sentencepiece, which is not installed"):
        check_tokenizer_library(bert)
    monkeypatch.setattr(recognise, "find_spec", lambda name: object())
    check_tokenizer_library(bert)
    monkeypatch.setattr(recognise, "find_spec", lambda name: None)
    (bert / "spiece.model").write_bytes(b"other")
    check_tokenizer_library(bert)
