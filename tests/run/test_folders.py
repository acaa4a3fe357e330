"""A model's folder is more than its weights: what runs keep of it, name and digest."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import ffsplit
from ffsplit.cli import main
from ffsplit.run.job import prepare
from ffsplit.store.manifest import Manifest
from ffsplit.store.pull import verify
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob, needs_of

ROLES = "{% for message in messages %}<{{ message.role }}>{% endfor %}"


@pytest.fixture
def folder(small_job: SmallJob, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_job.model, tmp_path / "folder"))


def compressed(small_job: SmallJob, model: Path, out: Path, **fields: object) -> tuple[Manifest, Path]:
    manifest = ffsplit.compress(small_job.config(out, model=str(model), **fields))
    assert verify(str(out)).ok
    return manifest, out / manifest.run_key / manifest.attempt


def test_a_sentence_transformer_keeps_every_module(
    checkpoint_of: CheckpointFactory, small_job: SmallJob, tmp_path: Path
) -> None:
    """With all neurons kept the artifact's embeddings are the original's, to the bit."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    words = Transformer(str(checkpoint_of("bert")), max_seq_length=20)
    modules = [words, Pooling(words.get_embedding_dimension(), "cls"), Dense(32, 12), Normalize()]
    original = SentenceTransformer(modules=modules)
    original.save_pretrained(str(tmp_path / "sentences"))
    _, artifact = compressed(small_job, tmp_path / "sentences", tmp_path / "out", keep=1.0)
    loaded, texts = SentenceTransformer(str(artifact)), ["the time of the people", "one " * 40]
    assert loaded.max_seq_length == 20 and len(loaded) == 4
    expected = SentenceTransformer(str(tmp_path / "sentences")).encode(texts)
    assert expected.shape == (2, 12) and (loaded.encode(texts) == expected).all()


def test_named_chat_templates_come_along(
    checkpoint_of: CheckpointFactory, small_job: SmallJob, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(checkpoint_of("llama", head="ForCausalLM"), tmp_path / "chat"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "plain", "tool_use": ROLES}
    tokenizer.save_pretrained(model)
    assert (model / "additional_chat_templates" / "tool_use.jinja").is_file()
    _, artifact = compressed(small_job, model, tmp_path / "out")
    tokenizer, talk = AutoTokenizer.from_pretrained(artifact), [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(talk, chat_template="tool_use", tokenize=False) == "<user>"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "plain"


def test_what_is_left_out_is_named_everywhere(
    small_job: SmallJob, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SetFit's head is a pickle, so it stays behind, and its config does not come without it."""
    (folder / "model_head.pkl").write_bytes(pickle.dumps("a classifier"))
    (folder / "config_setfit.json").write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"stale")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nAll about it.")
    capsys.readouterr()
    manifest, artifact = compressed(small_job, folder, tmp_path / "out")
    names = {entry.path for entry in manifest.files}
    assert not names & {"model_head.pkl", "config_setfit.json", "onnx/model.onnx"}
    line = next(each for each in capsys.readouterr().err.splitlines() if "left out of the artifact" in each)
    card = (artifact / "README.md").read_text()
    for path in ("model_head.pkl", "config_setfit.json", "onnx/"):
        assert path in line and f"- `{path}`: " in card
        assert path in {each.path for each in manifest.model.left_out}
    assert "All about it." in (artifact / "README.original.md").read_text()
    assert "(README.original.md)" in card and "license: mit" in card
    arguments = small_job.arguments(str(tmp_path / "other"), "--runner", "serial", "--dry-run")
    assert main(["compress", str(folder), *arguments[1:]]) == 0
    assert line.split("left out")[1] in capsys.readouterr().out


def test_nothing_is_said_where_nothing_is_left_out(
    small_job: SmallJob, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, artifact = compressed(small_job, folder, tmp_path / "out")
    assert manifest.model.left_out == () and "left out" not in capsys.readouterr().err
    assert "not here" not in (artifact / "README.md").read_text()


@pytest.mark.parametrize("name", ["2_Dense/model.bin.json", "chat_template.jinja", "odd.vocab", "LICENSE"])
def test_a_run_key_is_of_all_that_a_result_may_depend_on(
    small_job: SmallJob, folder: Path, tmp_path: Path, name: str
) -> None:
    keys = []
    for text in ("one", "two"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        keys.append(prepare(small_job.config(tmp_path / "out", model=str(folder))).keys.run)
    assert (keys[0] == keys[1]) == (name == "LICENSE")


def test_what_comes_along_is_counted_before_the_run(
    small_job: SmallJob, folder: Path, tmp_path: Path
) -> None:
    config = small_job.config(tmp_path / "out", model=str(folder))
    before = needs_of(config)
    (folder / "large.table").write_bytes(bytes(1_000_000))
    after = needs_of(config)
    assert after.temporary.needed_bytes - before.temporary.needed_bytes == 1_000_000
    assert after.store.needed_bytes - before.store.needed_bytes == 1_000_000


def test_weights_that_came_along_are_not_the_models_size(
    small_job: SmallJob, folder: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    plain, _ = compressed(small_job, folder, tmp_path / "out")
    save_file({"value": torch.ones(1000)}, folder / "value_head.safetensors")
    with_head, artifact = compressed(small_job, folder, tmp_path / "out")
    assert (artifact / "value_head.safetensors").is_file()
    assert plain.measurements is not None and with_head.measurements is not None
    assert with_head.measurements.compressed_size == plain.measurements.compressed_size
    assert json.loads((artifact / "config.json").read_text())["model_type"] == "bert"
