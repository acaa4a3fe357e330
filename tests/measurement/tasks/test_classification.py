"""Accuracy and F1 equal a direct computation; labels are names or ids, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ffsplit.errors import ConfigError
from ffsplit.measurement.tasks.classification import Classification, f1_score, predict_labels
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from tests.conftest import CheckpointFactory
from tests.measurement.tasks.conftest import LoadedFactory, load
from tests.tiny_models import WORDS

HEAD = "ForSequenceClassification"
TEXTS = [" ".join(WORDS[start : start + 1 + start % 5]) for start in range(24)]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
@pytest.mark.parametrize("num_labels", [2, 3])
@torch.no_grad()
def test_scores_are_a_direct_computation(
    loaded: LoadedFactory, tmp_path: Path, family: str, num_labels: int
) -> None:
    checkpoint, model, tokenizer = loaded(family, head=HEAD, num_labels=num_labels)
    one_by_one = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]
    assert predict_labels(model, tokenizer, TEXTS, max_length=64).tolist() == one_by_one
    labels = [index % num_labels for index in range(len(TEXTS))]
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in zip(TEXTS, labels, strict=True)))
    task = Classification.read(f"classification:{path}", checkpoint=checkpoint)
    accuracy, f1 = task.score(model, tokenizer)
    num_right = sum(a == b for a, b in zip(one_by_one, labels, strict=True))
    assert accuracy.value == pytest.approx(100 * num_right / len(TEXTS))
    assert (accuracy.metric, f1.metric) == ("accuracy", "f1" if num_labels == 2 else "macro_f1")
    assert accuracy.num_examples == f1.num_examples == len(TEXTS)


def test_what_a_model_predicts_scores_a_hundred(loaded: LoadedFactory, tmp_path: Path) -> None:
    checkpoint, model, tokenizer = loaded("bert", head=HEAD, num_labels=3)
    predicted = predict_labels(model, tokenizer, TEXTS, max_length=64)
    path = tmp_path / "a.jsonl"
    rows = [{"text": text, "label": int(label)} for text, label in zip(TEXTS, predicted, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = Classification.read(f"classification:{path}", checkpoint=checkpoint)
    assert [score.value for score in task.score(model, tokenizer)] == [100, 100]


def test_f1_by_its_definition() -> None:
    truth, predicted = np.array([1, 1, 1, 0, 0]), np.array([1, 0, 1, 1, 0])
    precision, recall = 2 / 3, 2 / 3
    assert f1_score(truth, predicted, num_labels=2) == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    of_zero = 2 * 0.5 * 0.5 / (0.5 + 0.5)
    assert f1_score(truth, predicted, num_labels=3) == pytest.approx((2 / 3 + of_zero) / 2)
    assert f1_score(np.array([0, 0]), np.array([0, 0]), num_labels=2) == 0
    assert f1_score(np.array([0, 2]), np.array([0, 1]), num_labels=3) == pytest.approx(1 / 3)


@pytest.fixture
def named(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Checkpoint:
    """A classifier whose labels have names."""
    directory = Path(shutil.copytree(checkpoint_of("bert", head=HEAD, num_labels=3), tmp_path / "model"))
    set_config(directory, id2label={"0": "bad", "1": "so so", "2": "good"})
    return open_checkpoint(directory)


def set_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def labels(checkpoint: Checkpoint, path: Path, text: str) -> tuple[int, ...]:
    path.write_text(text)
    return Classification.read(f"classification:{path}", checkpoint=checkpoint).labels


@pytest.mark.parametrize(
    "text",
    [
        "a b\t0\nc d\t2\ne f\t1\n",
        "a b\tbad\nc d\tgood\ne f\tso so\n",
        "text\tlabel\na\tbad\nc\tgood\ne\tso so\n",
    ],
)
def test_labels_are_ids_or_names(named: Checkpoint, tmp_path: Path, text: str) -> None:
    assert labels(named, tmp_path / "a.tsv", text) == (0, 2, 1)


def test_the_first_row_is_data_where_its_label_is_one(named: Checkpoint, tmp_path: Path) -> None:
    assert labels(named, tmp_path / "a.tsv", "wonderful\tgood\nawful\tbad\n") == (2, 0)


def test_names_that_look_like_ids_are_names(named: Checkpoint, tmp_path: Path) -> None:
    set_config(named.directory, id2label={"0": "1", "1": "2", "2": "3"})
    checkpoint = open_checkpoint(named.directory)
    assert labels(checkpoint, tmp_path / "a.tsv", "a b\t1\nc d\t3\n") == (0, 2)


@pytest.mark.parametrize("label", ["3", "-1", "1.5", "awful", "", "\u0661"])
def test_an_unknown_label_is_named(named: Checkpoint, tmp_path: Path, label: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"a\.tsv:2: the label {label!r} is not one of the model's: 0 'bad'"
    ):
        labels(named, tmp_path / "a.tsv", f"a b\t0\nc d\t{label}\n")


def test_names_and_ids_are_not_mixed(named: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names and ids cannot be mixed"):
        labels(named, tmp_path / "a.tsv", "a b\t0\nc d\tgood\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["BertModel"]}, r"needs a model with a head .*, not BertModel"),
        ({"architectures": None}, "not a model without a head"),
        ({"problem_type": "regression"}, "the model's head is for regression"),
        ({"problem_type": "multi_label_classification"}, "for multi_label_classification"),
        ({"id2label": {"0": "LABEL_0"}}, r"one output \(a regression\)"),
    ],
)
def test_a_model_that_does_not_classify(
    named: Checkpoint, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    set_config(named.directory, **fields)
    with pytest.raises(ConfigError, match=message):
        labels(open_checkpoint(named.directory), tmp_path / "a.tsv", "a b\t0\n")


@pytest.mark.slow
def test_the_accuracy_of_a_trained_classifier(development_data: Path) -> None:
    checkpoint, model, tokenizer = load(development_data / "minilm-l6-sst2")
    task = Classification.read(f"classification:{development_data}/sst2/dev.tsv", checkpoint=checkpoint)
    accuracy, _ = task.score(model, tokenizer)
    assert accuracy.num_examples == 872
    assert accuracy.value == pytest.approx(89.56, abs=0.01)
