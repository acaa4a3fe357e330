"""What hosts are given that do not see the driver's directory."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import ModelSource, described, staged
from ffsplit.models.load import load_tokenizer
from ffsplit.store.scratch import Scratch
from tests.conftest import CheckpointFactory
from tests.tiny_models import save_checkpoint


def test_another_host_gets_the_folder_as_an_artifact_would_keep_it(tmp_path: Path) -> None:
    """Sub-folders and odd names included, and none of what is left out."""
    directory = save_checkpoint(tmp_path / "model", "bert")
    for name in ("additional_chat_templates/tool use.jinja", "2_Dense/config.json", "odd.vocab"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    here = open_checkpoint(directory)
    digests, wanted = (here.model_digest(), here.tokenizer_digest()), here.folder.files.wanted
    for name in ("pytorch_model.bin", "onnx/model.onnx", ".git/config"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(name))
    source = described(ModelSource(path=str(directory)))
    assert tuple(entry.path for entry in source.files) == wanted and source.is_here()
    place = Scratch(uri=str(tmp_path / "store"), prefix="scratch/model")
    there = pickle.loads(pickle.dumps(staged(source, place, once=True)))
    shutil.rmtree(directory)
    checkpoint = open_checkpoint(there.directory())
    assert (checkpoint.model_digest(), checkpoint.tokenizer_digest()) == digests
    assert len(load_tokenizer(checkpoint)) > 5


def test_a_host_that_does_not_see_the_files_says_so(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "model"))
    source = described(ModelSource(path=str(directory)))
    assert source.directory() == directory
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"host .* has joined and does not see these files: .*s3://bucket"):
        source.directory()


def test_what_is_staged_already_is_not_stored_again(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    """Unless it is not known to be of this content, or is of another size."""
    source = described(ModelSource(path=str(checkpoint_of("bert"))))
    place = Scratch(uri=str(tmp_path / "store"), prefix="scratch/model")
    staged(source, place, once=True)
    there = tmp_path / "store" / "scratch" / "model" / "config.json"
    content = there.read_bytes()
    for marked, once, expected in (
        (bytes(len(content)), True, bytes(len(content))),
        (bytes(len(content)), False, content),
        (b"short", True, content),
    ):
        there.write_bytes(marked)
        staged(source, place, once=once)
        assert there.read_bytes() == expected
