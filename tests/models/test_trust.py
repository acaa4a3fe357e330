"""Code that comes with a model is run only where it is trusted, and then wherever the model is loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import ffsplit
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import ModelSource, described, staged
from ffsplit.models.load import load_base_model
from ffsplit.models.load_options import remote_classes, trusted, trusting
from ffsplit.store.scratch import Scratch
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob

CODE = '''
import pathlib
from transformers import BertModel

class DoubledBert(BertModel):
    """Its states are twice BERT's; loading it leaves a mark."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

pathlib.Path(__MARK__).touch()
'''


@pytest.fixture
def with_code(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "with-code"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["DoubledBert"], "auto_map": {"AutoModel": "modeling_doubled.DoubledBert"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_doubled.py").write_text(CODE.replace("__MARK__", repr(str(tmp_path / "mark"))))
    return directory


def test_trust_ends_with_its_block() -> None:
    with trusting(), trusting(False):
        assert trusted()
    assert not trusted()


def test_an_auto_map_names_code_by_the_first_class_it_has(tmp_path: Path) -> None:
    """Of two, a slow and a fast tokenizer, the first may be null; what is no name is none."""
    auto_map = {"AutoTokenizer": [None, "t.Fast"], "AutoModel": "m.Own", "AutoConfig": [None, None]}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map | {"AutoProcessor": 3}}))
    assert remote_classes(tmp_path) == {"AutoTokenizer": "t.Fast", "AutoModel": "m.Own"}


@pytest.mark.parametrize(
    "command", ["compress", "calibrate", "inspect", "latency-table", "export", "benchmark"]
)
def test_code_is_refused_in_one_line(
    with_code: Path, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = [] if command in ("inspect", "benchmark") else ["--out", str(tmp_path / "out")]
    more += {"compress": ["--runner", "serial"], "export": ["--format", "onnx"]}.get(command, [])
    assert main([command, str(with_code), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "code of its own (modeling_doubled.DoubledBert)" in said and "--trust-remote-code" in said
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("block_by_block", [False, True])
def test_trusted_code_is_what_runs(
    with_code: Path, small_job: SmallJob, tmp_path: Path, block_by_block: bool
) -> None:
    out = tmp_path / "out"
    manifest = ffsplit.compress(
        small_job.config(out, model=str(with_code), trust_remote_code=True, block_by_block=block_by_block)
    )
    assert (tmp_path / "mark").exists()
    assert manifest.compute.trust_remote_code
    assert "modeling_doubled.py" in {entry.path for entry in manifest.files}
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        ffsplit.load(str(out))
    model = ffsplit.load(str(out), trust_remote_code=True)
    assert type(model).__name__ == "DoubledBert"
    plain = super(type(model), model)
    ids = torch.arange(6, 18).view(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], 2 * plain.forward(ids)[0])


def test_code_is_part_of_a_models_digest(with_code: Path) -> None:
    with trusting():
        before = open_checkpoint(with_code).model_digest()
        (with_code / "modeling_doubled.py").write_text("# other code\n")
        assert open_checkpoint(with_code).model_digest() != before


@pytest.mark.parametrize("command", ["inspect", "latency-table"])
def test_a_command_that_is_told_to_trusts(
    with_code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["--out", str(tmp_path / "table.json"), "--num-tokens", "8"] if command == "latency-table" else []
    assert main([command, str(with_code), *more, "--trust-remote-code"]) == 0
    assert (tmp_path / "mark").exists() == (command == "latency-table")


def test_another_host_gets_the_code_with_the_model(with_code: Path, tmp_path: Path) -> None:
    """A model that only the driver's host sees, put into the scratch for the others."""
    source = described(ModelSource(path=str(with_code)))
    assert "modeling_doubled.py" in {entry.path for entry in source.files}
    place = Scratch(uri=str(tmp_path / "store"), prefix="scratch/model")
    there = pickle.loads(pickle.dumps(staged(source, place, once=True)))
    shutil.rmtree(with_code)
    directory = there.directory()
    assert directory.is_relative_to(tmp_path / "store")
    with trusting():
        checkpoint = open_checkpoint(directory)
        model = load_base_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert type(model).__name__ == "DoubledBert"
