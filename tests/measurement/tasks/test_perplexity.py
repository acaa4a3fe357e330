"""Perplexity equals a direct loop over windows, and the model's own loss."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.measurement.tasks.language_model import (
    LONGEST_WINDOW,
    Perplexity,
    tokenize_text,
    windows_perplexity,
)
from ffsplit.models.checkpoint import open_checkpoint
from tests.conftest import CheckpointFactory
from tests.measurement.tasks.conftest import LoadedFactory, load
from tests.tiny_models import WORDS, random_rows

TEXT = " ".join(random.Random(0).choices(WORDS, k=150))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("window", [2, 7, 151, 160])
@torch.no_grad()
def test_a_direct_loop_over_windows(loaded: LoadedFactory, text_file: Path, family: str, window: int) -> None:
    checkpoint, model, tokenizer = loaded(family, head="ForCausalLM")
    task = Perplexity.read(f"perplexity:{text_file}", checkpoint=checkpoint, max_length=window)
    (score,) = task.score(model, tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == 152
    loss, count = 0.0, 0
    for start in range(0, len(ids), window):
        row = torch.tensor([ids[start : start + window]])
        if row.shape[1] > 1:
            log_TV = model(row).logits[0].double().log_softmax(-1)
            loss -= float(log_TV[:-1].gather(-1, row[0, 1:, None]).sum())
            count += row.shape[1] - 1
    assert score.num_examples == count
    assert score.value == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert score.higher_is_better is False


def test_one_window_is_the_models_own_loss(loaded: LoadedFactory) -> None:
    _, model, tokenizer = loaded("opt", head="ForCausalLM")
    ids = tokenize_text(tokenizer, TEXT)[:100]
    with torch.no_grad():
        loss = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    value, num_tokens = windows_perplexity(model, [ids])
    assert (value, num_tokens) == (pytest.approx(math.exp(loss), rel=1e-5), 99)


@pytest.mark.parametrize(("max_length", "window"), [(None, 160), (32, 32), (1000, 160)])
def test_the_window_is_what_is_asked_for_or_what_the_model_reads(
    checkpoint_of: CheckpointFactory, text_file: Path, max_length: int | None, window: int
) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    task = Perplexity.read(f"perplexity:{text_file}", checkpoint=checkpoint, max_length=max_length)
    assert task.max_length == window
    checkpoint.config["max_position_embeddings"] = 131_072
    task = Perplexity.read(f"perplexity:{text_file}", checkpoint=checkpoint, max_length=None)
    assert task.max_length == LONGEST_WINDOW


def test_line_ends_do_not_matter(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    digests = set()
    for content in (b"one two\nthe people\n", b"one two\r\nthe people\r\n"):
        (tmp_path / "a.txt").write_bytes(content)
        task = Perplexity.read(f"perplexity:{tmp_path}/a.txt", checkpoint=checkpoint, max_length=None)
        assert task.text == "one two\nthe people\n"
        digests.add(task.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("family", "head", "what"),
    [("bert", "ForMaskedLM", "BertForMaskedLM"), ("llama", "", "LlamaModel"), ("bert", "", "BertModel")],
)
def test_a_model_that_predicts_no_next_token(
    checkpoint_of: CheckpointFactory, text_file: Path, family: str, head: str, what: str
) -> None:
    checkpoint = open_checkpoint(checkpoint_of(family, head=head))
    with pytest.raises(ConfigError, match=f"needs a causal language model .*, not {what}"):
        Perplexity.read(f"perplexity:{text_file}", checkpoint=checkpoint, max_length=None)


@pytest.mark.parametrize(
    ("spec", "max_length", "message"),
    [
        ("{text_file}", 1, "windows of 1 token predict nothing"),
        ("{text_file}#text", None, "has no columns"),
        ("none.txt", None, "does not exist"),
        ("none.csv", None, r"needs a file that ends in \.txt"),
        ("{empty}", None, "the file is empty"),
    ],
)
def test_text_that_cannot_be_used(
    checkpoint_of: CheckpointFactory, text_file: Path, spec: str, max_length: int | None, message: str
) -> None:
    empty = text_file.with_name("empty.txt")
    empty.write_text(" \n")
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    spec = "perplexity:" + spec.format(text_file=text_file, empty=empty)
    with pytest.raises(ConfigError, match=message):
        Perplexity.read(spec, checkpoint=checkpoint, max_length=max_length)


def test_text_of_one_token(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    """With a tokenizer that puts no special tokens around it."""
    directory = Path(shutil.copytree(checkpoint_of("llama", head="ForCausalLM"), tmp_path / "model"))
    fields = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(fields | {"post_processor": None}))
    (tmp_path / "text.txt").write_text(" the\n")
    with pytest.raises(ConfigError, match="the text is a single token"):
        Perplexity.read(
            f"perplexity:{tmp_path}/text.txt", checkpoint=open_checkpoint(directory), max_length=None
        )


def test_a_perplexity_that_is_no_float(loaded: LoadedFactory) -> None:
    _, model, _ = loaded("llama", head="ForCausalLM", seed=2)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    with pytest.raises(FFSplitError, match=r"the perplexity overflows: a mean loss of .* nats per token"):
        windows_perplexity(model, random_rows(3))


@pytest.mark.slow
def test_the_perplexity_of_a_trained_model(development_data: Path, tmp_path: Path) -> None:
    """On the first tenth of the held-out text, where it is a little below that of the whole."""
    whole = (development_data / "corpus" / "heldout.txt").read_text("utf-8")
    (tmp_path / "a.txt").write_text(whole[: len(whole) // 10], "utf-8")
    checkpoint, model, tokenizer = load(development_data / "tiny-llama")
    task = Perplexity.read(f"perplexity:{tmp_path}/a.txt", checkpoint=checkpoint, max_length=256)
    (score,) = task.score(model, tokenizer)
    assert 80 < score.value < 110
