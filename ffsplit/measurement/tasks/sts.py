"""Semantic textual similarity: do cosines of sentence embeddings rank pairs as people do?

Embeddings and score are computed as in sentence-transformers: mean of the token states, cosine, and
Spearman's rank correlation x 100. Source: Reimers and Gurevych, arXiv:1908.10084.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ffsplit.config import Record
from ffsplit.errors import ConfigError
from ffsplit.keys import digest_of
from ffsplit.measurement.fidelity import hidden_states
from ffsplit.measurement.tasks.base import (
    TABLES,
    Score,
    TaskFile,
    longest_row,
    ordered_batches,
    read_rows,
    task_error,
    task_file,
)
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.tensor_files import read_json

COLUMNS = ("sentence1", "sentence2", "score")


class SentencePair(NamedTuple):
    """Two sentences and their similarity as rated by people."""

    first: str
    second: str
    score: float


class SentenceSimilarity(Record):
    """Pairs of sentences, each with a score. Sentences are cut to `max_length` tokens."""

    form: ClassVar[str] = "sts:file.csv[#first,second,score]"
    is_running_text: ClassVar[bool] = False
    kind: Literal["sts"] = "sts"
    name: str
    pairs: tuple[SentencePair, ...]
    max_length: int

    @classmethod
    def read(cls, spec: str, *, checkpoint: Checkpoint, max_length: int | None = None) -> SentenceSimilarity:
        """`sts:file.csv[#first,second,score]`, for an encoder. Raises ConfigError if either does not fit."""
        if not checkpoint.reads_single_texts or checkpoint.makes != "states":
            what = checkpoint.class_name or checkpoint.architecture.model_type
            raise task_error(spec, f"sts needs a sentence encoder, and the model is a causal {what}")
        file = task_file(spec, suffixes=TABLES)
        pairs = read_sentence_pairs(file)
        return cls(name=f"sts {file.path.name}", pairs=pairs, max_length=_sentence_length(checkpoint))

    @property
    def digest(self) -> str:
        return digest_of({"pairs": self.pairs})

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for pair in self.pairs for text in (pair.first, pair.second))

    def score(self, model: Any, tokenizer: Any) -> tuple[Score, ...]:
        value = sts_score(model, tokenizer, self.pairs, max_length=self.max_length)
        return (Score(self.name, "spearman", value, len(self.pairs)),)


def read_sentence_pairs(file: TaskFile) -> tuple[SentencePair, ...]:
    """The pairs of a file. Raises ConfigError if a score is not a number, or all scores are equal."""
    rows = read_rows(file, names=COLUMNS, is_value=_is_number)
    for row in rows:
        if not _is_number(row.cells[2]):
            raise task_error(row.where, f"the score {row.cells[2]!r} is not a number")
    pairs = tuple(SentencePair(row.cells[0], row.cells[1], float(row.cells[2])) for row in rows)
    if len({pair.score for pair in pairs}) < 2:
        raise task_error(file.spec, f"every score is {pairs[0].score:g}: a ranking needs scores that differ")
    return pairs


def sts_score(model: Any, tokenizer: Any, pairs: Sequence[SentencePair], *, max_length: int = 256) -> float:
    """Spearman correlation x 100 of the embeddings' cosines with the pairs' scores."""
    from scipy.stats import spearmanr  # seconds to import

    sentences = [pair.first for pair in pairs] + [pair.second for pair in pairs]
    first_SD, second_SD = sentence_embeddings(model, tokenizer, sentences, max_length=max_length).chunk(2)
    cosines = (first_SD * second_SD).sum(-1).numpy()
    return 100.0 * float(spearmanr(cosines, np.array([pair.score for pair in pairs])).statistic)


@torch.no_grad()
def sentence_embeddings(model: Any, tokenizer: Any, sentences: Sequence[str], *, max_length: int) -> Tensor:
    """Mean-pooled token states of the base model, unit length: [sentences, D] on the CPU."""
    pooled, order = [], []
    for indices, batch in ordered_batches(model, tokenizer, sentences, max_length=max_length):
        states_BTD = hidden_states(model, batch)
        mask_BT1 = batch.attention_mask.unsqueeze(-1)
        pooled.append(((states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)).cpu())
        order += indices
    embeddings_SD = torch.empty(len(sentences), pooled[0].shape[1])
    embeddings_SD[order] = torch.cat(pooled)
    return torch.nn.functional.normalize(embeddings_SD, dim=-1)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _sentence_length(checkpoint: Checkpoint) -> int:
    """Tokens that sentences are cut to: from the model's sentence-transformers file, or all it can read."""
    path = checkpoint.directory / "sentence_bert_config.json"
    try:
        longest: Any = read_json(path, "").get("max_seq_length")
    except ConfigError:
        return longest_row(checkpoint)
    usable = isinstance(longest, int) and longest > 0
    return min(longest, longest_row(checkpoint)) if usable else longest_row(checkpoint)
