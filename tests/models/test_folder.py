"""What a model's folder consists of: by names alone, and the same wherever the folder is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffsplit.errors import ConfigError
from ffsplit.models import folder as folder_module
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.folder import (
    ADAPTER,
    COPY,
    HIDDEN,
    NO_FILE,
    OWN,
    PICKLE,
    WEIGHTLESS,
    FolderFiles,
    Listing,
    left_out_in_one_line,
    local_listing,
    sort_files,
)
from tests.conftest import CheckpointFactory
from tests.tiny_models import save_checkpoint

BASE = ("config.json", "model.safetensors", "tokenizer.json")


def sort(*names: str, contents: Mapping[str, Any] | None = None) -> FolderFiles:
    """The files of a folder that is nothing but names and some JSON."""
    texts = {name: json.dumps(value).encode() for name, value in (contents or {}).items()}
    return sort_files(Listing("somewhere", (*BASE, *names), lambda name: texts.get(name, b"{}")))


@pytest.mark.parametrize(
    "name",
    [
        "2_Dense/model.safetensors",
        "2_Dense/model.safetensors.index.json",
        "additional_chat_templates/tool_use.jinja",
        "adapter.eng.safetensors",
        "audio_tokenizer/config.json",
        "audio_tokenizer/model.safetensors",
        "configuration_custom.py",
        "dict.txt",
        "emoji.json",
        "generation_config.json",
        "images/a b.png",
        "params.json",
        "prophetnet.tokenizer",
        "qwen.tiktoken",
        "README.md",
        "sentencepiece.bpe.model",
        "source.spm",
        "value_head.safetensors",
        "vocabulary without a suffix",
        "voices/one.npz",
    ],
)
def test_what_comes_along(name: str) -> None:
    files = sort(name)
    assert files.companions == tuple(sorted((name, "tokenizer.json"))) and files.left_out == ()
    assert files.anew == ("config.json", "model.safetensors")
    assert files.wanted == tuple(sorted((*BASE, name)))


@pytest.mark.parametrize(
    ("names", "path", "reason"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin", COPY),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin", COPY),
        (["pytorch_model.bin.index.json"], "pytorch_model.bin.index.json", COPY),
        (["tf_model.h5"], "tf_model.h5", COPY),
        (["flax_model.msgpack"], "flax_model.msgpack", COPY),
        (["rust_model.ot"], "rust_model.ot", COPY),
        (["bert_model.ckpt.data-00000-of-00001"], "bert_model.ckpt.data-00000-of-00001", COPY),
        (["model.fp16.safetensors"], "model.fp16.safetensors", COPY),
        (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors", COPY),
        (["consolidated.safetensors"], "consolidated.safetensors", COPY),
        (["Model.Q4_K_M.GGUF"], "Model.Q4_K_M.GGUF", COPY),
        (["model_quantized.onnx"], "model_quantized.onnx", COPY),
        (["onnx/model.onnx", "onnx/config.json", "onnx/a/vocab.txt"], "onnx/", COPY),
        (["openvino/openvino_model.bin", "openvino/openvino_model.xml"], "openvino/", COPY),
        (["original/consolidated.00.pth", "original/params.json"], "original/", COPY),
        (["coreml/x.mlpackage/Data/weight.bin"], "coreml/x.mlpackage/", COPY),
        (["saved_model/1/saved_model.pb", "saved_model/1/variables/v.data-0"], "saved_model/1/", COPY),
        (["2_Dense/pytorch_model.bin", "2_Dense/config.json"], "2_Dense/", COPY),
        (["checkpoint-500/model.safetensors", "checkpoint-500/config.json"], "checkpoint-500/", COPY),
        (["training_args.bin"], "training_args.bin", PICKLE),
        (["colbert_linear.pt"], "colbert_linear.pt", PICKLE),
        (["model_head.pkl"], "model_head.pkl", PICKLE),
        (["config_setfit.json"], "config_setfit.json", WEIGHTLESS),
        (["ort_config.json"], "ort_config.json", WEIGHTLESS),
        (["lora/adapter_config.json", "lora/adapter_model.safetensors"], "lora/", ADAPTER),
        ([".git/config", ".git/objects/12/34"], ".git/", HIDDEN),
        ([".gitattributes"], ".gitattributes", HIDDEN),
        ([".env"], ".env", HIDDEN),
        ([".cache/huggingface/download/x.metadata"], ".cache/", HIDDEN),
        (["code/__pycache__/x.pyc"], "code/__pycache__/", HIDDEN),
        (["manifest.json"], "manifest.json", OWN),
        (["stats/neurons.parquet"], "stats/neurons.parquet", OWN),
        (["a\u202eb.json"], "a\\u202eb.json", NO_FILE),
    ],
)
def test_what_is_left_out_is_named(names: list[str], path: str, reason: str) -> None:
    files = sort(*names)
    assert files.companions == ("tokenizer.json",)
    assert [(each.path, each.reason) for each in files.left_out] == [(path, reason)]


def test_a_folder_keeps_its_config_with_one_of_two_copies_of_its_weights() -> None:
    files = sort("2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin")
    assert files.companions == ("2_Dense/config.json", "2_Dense/model.safetensors", "tokenizer.json")
    assert [each.path for each in files.left_out] == ["2_Dense/pytorch_model.bin"]


def test_no_config_comes_along_without_its_pickle() -> None:
    files = sort(
        "vocoder.pt", "vocoder_config.json", "config_vocoder.yaml", "vocoder.txt", "a/b.pt", "a/c.json"
    )
    assert files.companions == ("a/c.json", "tokenizer.json", "vocoder.txt")
    files = sort("a/b.pt", "a/config.json", "a/c.json", "b/b.pt", "b/b-config.json", "b/c.json")
    assert files.companions == ("b/c.json", "tokenizer.json")
    assert [each.path for each in files.left_out] == ["a/", "b/b-config.json", "b/b.pt"]


def test_the_config_of_metas_format_goes_with_its_weights() -> None:
    files = sort("params.json", "consolidated.00.pth")
    assert [each.path for each in files.left_out] == ["consolidated.00.pth", "params.json"]


@pytest.mark.parametrize(
    ("contents", "read"),
    [
        ({}, {"model.safetensors"}),
        ({"config.json": {"transformers_weights": "odd.safetensors"}}, {"odd.safetensors"}),
        (
            {
                "config.json": {"transformers_weights": "odd.index.json"},
                "odd.index.json": {"weight_map": {"a": "odd.safetensors", "b": "model-2.safetensors"}},
            },
            {"odd.index.json", "odd.safetensors", "model-2.safetensors"},
        ),
    ],
)
def test_the_weights_are_those_that_transformers_reads(contents: dict[str, Any], read: set[str]) -> None:
    names = ["odd.safetensors", "odd.index.json", "model-2.safetensors", "model.safetensors.index.json"]
    files = sort(*names, contents=contents)
    assert {name for name in files.anew if not name.startswith(("config", "model.safetensors.i"))} == read
    assert "model-2.safetensors" not in files.companions


def test_one_line_names_everything() -> None:
    files = sort("pytorch_model.bin", "model_head.pkl", *(f"tf_model-{n}.h5" for n in range(7)))
    assert left_out_in_one_line(files.left_out) == (
        "left out of the artifact: model_head.pkl (a pickle, which can run code when it is loaded); "
        "pytorch_model.bin, tf_model-0.h5, tf_model-1.h5, tf_model-2.h5, tf_model-3.h5, tf_model-4.h5 and 2 "
        "more (another copy of the original's weights)"
    )
    assert left_out_in_one_line(()) is None


def test_documents_change_no_digest() -> None:
    documents = ["README.md", "LICENSE", "LICENSE-CC_BY.txt", "images/a.png", "sub/notes.MD"]
    files = sort(*documents, "merges.txt", "sub/x.json", "license_labels.json", "README.json")
    assert files.digested == (
        "README.json",
        "license_labels.json",
        "merges.txt",
        "sub/x.json",
        "tokenizer.json",
    )


@pytest.mark.parametrize(
    "name",
    [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "preprocessor_config.json",
        "prophetnet.tokenizer",
        "sentencepiece.bpe.model",
        "tokenization_custom.py",
        "2_Dense/config.json",
    ],
)
def test_every_file_that_a_result_may_depend_on_is_digested(tmp_path: Path, name: str) -> None:
    directory = save_checkpoint(tmp_path / "model", "bert")
    seen = {open_checkpoint(directory).tokenizer_digest()}
    for text in ("one", "two"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
        seen.add(open_checkpoint(directory).tokenizer_digest())
    assert len(seen) == 3


def test_links_are_followed_and_caches_are_not_looked_into(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    """As a snapshot in the hub's cache is: every file a link."""
    folder, elsewhere = tmp_path / "snapshot", tmp_path / "elsewhere"
    (folder / ".git" / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "x y.json").write_text("{}")
    for path in checkpoint_of("bert").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "sub").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe")
    listing = local_listing(folder)
    assert {"sub/x y.json", ".git/", "tokenizer.json"} <= {*listing.names} and listing.others == ("pipe",)
    left_out = open_checkpoint(folder).folder.files.left_out
    assert [(each.path, each.reason) for each in left_out] == [(".git/", HIDDEN), ("pipe", NO_FILE)]


@pytest.mark.parametrize("target", ["..", "nowhere"])
def test_links_that_lead_nowhere_are_refused(
    checkpoint_of: CheckpointFactory, tmp_path: Path, target: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="sub/link links to a f"):
        local_listing(tmp_path)


def test_names_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model", "bert")
    (directory / "Tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"two file names differ only in case, .okenizer\.json: rename"):
        open_checkpoint(directory)


@pytest.mark.parametrize("same_shape", [True, False])
def test_weights_of_an_odd_name_are_known_by_their_tensors(tmp_path: Path, same_shape: bool) -> None:
    """A copy is left out; a smaller model of the same family comes along."""
    directory = save_checkpoint(tmp_path / "model", "bert")
    tensors = {
        name: (tensor if same_shape else torch.ones(2, 2)).to(torch.float16)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    (directory / "draft").mkdir()
    for name in ("odd.safetensors", "draft/weights.safetensors"):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / name)
    (directory / "draft" / "config.json").write_text("{}")
    files = open_checkpoint(directory).folder.files
    assert [each.path for each in files.left_out] == (["draft/", "odd.safetensors"] if same_shape else [])
    assert ("draft/config.json" in files.companions) is not same_shape


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "2_Dense/model.safetensors"])
def test_a_git_lfs_pointer_is_told(tmp_path: Path, name: str) -> None:
    directory = save_checkpoint(tmp_path / "model", "bert")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    with pytest.raises(ConfigError, match=rf"{name} is a Git LFS pointer, .*git lfs pull"):
        open_checkpoint(directory)


def test_a_large_folder_that_is_no_model_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MOST_NAMES", 2)
    for name in ("a/1", "a/2", "a/3", "b/4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert local_listing(tmp_path).names == ("a/1", "a/2", "a/3")
    (tmp_path / "config.json").touch()
    assert local_listing(tmp_path).names == ("config.json", "a/1", "a/2", "a/3", "b/4")


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model. Root may read any, so the system's answer is made up."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "file").touch()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert local_listing(tmp_path).names == ()
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match=r"closed cannot be read: Permission denied$"):
        local_listing(tmp_path)
