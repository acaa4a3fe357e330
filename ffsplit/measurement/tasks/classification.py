"""Text classification through the model's own head: accuracy and F1 x 100; macro F1 for over two labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ffsplit.config import Record
from ffsplit.keys import digest_of
from ffsplit.measurement.tasks.base import (
    TABLES,
    Row,
    Score,
    longest_row,
    ordered_batches,
    read_rows,
    task_error,
    task_file,
)
from ffsplit.models.checkpoint import Checkpoint

COLUMNS = ("text", "label")
HEAD = "ForSequenceClassification"


class Classification(Record):
    """Texts, each with the id of its label. Texts are cut to `max_length` tokens."""

    form: ClassVar[str] = "classification:file.tsv[#text,label]"
    is_running_text: ClassVar[bool] = False
    kind: Literal["classification"] = "classification"
    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    num_labels: int
    max_length: int

    @classmethod
    def read(cls, spec: str, *, checkpoint: Checkpoint, max_length: int | None = None) -> Classification:
        """`classification:file.tsv[#text,label]`, for a model with a classification head.

        Labels are names of the config's `id2label`, or ids. Raises ConfigError if the model or the file does
        not fit.
        """
        names = _label_names(spec, checkpoint)
        file = task_file(spec, suffixes=TABLES)
        rows = read_rows(file, names=COLUMNS, is_value=lambda cell: _is_label(cell, names))
        return cls(
            name=f"classification {file.path.name}",
            texts=tuple(row.cells[0] for row in rows),
            labels=tuple(_label_ids(rows, names)),
            num_labels=len(names),
            max_length=longest_row(checkpoint),
        )

    @property
    def digest(self) -> str:
        return digest_of({"texts": self.texts, "labels": self.labels})

    def score(self, model: Any, tokenizer: Any) -> tuple[Score, ...]:
        predicted = predict_labels(model, tokenizer, self.texts, max_length=self.max_length)
        truth, count = np.array(self.labels), len(self.labels)
        accuracy = 100.0 * float((predicted == truth).mean())
        metric = "f1" if self.num_labels == 2 else "macro_f1"
        f1 = 100.0 * f1_score(truth, predicted, num_labels=self.num_labels)
        return Score(self.name, "accuracy", accuracy, count), Score(self.name, metric, f1, count)


@torch.no_grad()
def predict_labels(model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int) -> np.ndarray:
    """The label with the largest logit for each text: ids [texts]."""
    predicted = np.empty(len(texts), dtype=np.int64)
    for indices, batch in ordered_batches(model, tokenizer, texts, max_length=max_length):
        logits_BL = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        predicted[indices] = logits_BL.argmax(-1).cpu().numpy()
    return predicted


def f1_score(truth: np.ndarray, predicted: np.ndarray, *, num_labels: int) -> float:
    """F1 of label 1 if there are two labels; else the mean F1 of all labels that occur. In [0, 1]."""
    labels = [1] if num_labels == 2 else sorted({*truth.tolist(), *predicted.tolist()})
    scores = []
    for label in labels:
        num_right = int(((truth == label) & (predicted == label)).sum())
        num_either = int((truth == label).sum()) + int((predicted == label).sum())
        scores.append(2 * num_right / num_either if num_either else 0.0)
    return sum(scores) / len(scores)


def _label_names(spec: str, checkpoint: Checkpoint) -> list[str]:
    """The labels' names by id. Raises ConfigError if the model has no classification head."""
    if not checkpoint.class_name.endswith(HEAD):
        what = checkpoint.class_name or "a model without a head"
        raise task_error(spec, f"classification needs a model with a head (...{HEAD}), not {what}")
    problem = checkpoint.config.get("problem_type") or "single_label_classification"
    if problem != "single_label_classification":
        raise task_error(spec, f"the model's head is for {problem}, not for one label per text")
    named = checkpoint.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' default
    names = [str(named.get(str(index), f"LABEL_{index}")) for index in range(len(named))]
    if len(names) < 2:
        raise task_error(spec, "the model's head has one output (a regression), so it has no labels")
    return names


def _label_ids(rows: Sequence[Row], names: Sequence[str]) -> list[int]:
    """The labels as ids. They are read as names if every label is one."""
    by_name = {name: index for index, name in enumerate(names)}
    if all(row.cells[1] in by_name for row in rows):
        return [by_name[row.cells[1]] for row in rows]
    for row in rows:
        if not _is_id(row.cells[1], len(names)):
            known = ", ".join(f"{index} {name!r}" for index, name in enumerate(names[:20]))
            mixed = " (names and ids cannot be mixed)" if row.cells[1] in by_name else ""
            raise task_error(
                row.where, f"the label {row.cells[1]!r} is not one of the model's: {known}{mixed}"
            )
    return [int(row.cells[1]) for row in rows]


def _is_id(text: str, num_labels: int) -> bool:
    return text.isascii() and text.isdigit() and int(text) < num_labels


def _is_label(text: str, names: Sequence[str]) -> bool:
    return text in names or _is_id(text, len(names))
