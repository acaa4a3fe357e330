"""Task scores: what users of a model judge it by."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ffsplit.calibration.batches import padded_batches, tokenize_rows
from ffsplit.errors import ConfigError

BATCH_TOKENS = 4096


class SentencePair(NamedTuple):
    """Two sentences and how alike people found them."""

    first: str
    second: str
    score: float


def read_sentence_pairs(path: Path) -> list[SentencePair]:
    """The rows of a csv with two sentences and a score, without a header. Raises ConfigError."""
    pairs = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            try:
                first, second, score = row
                pairs.append(SentencePair(first, second, float(score)))
            except ValueError:
                raise ConfigError(f"{path}:{line}: expected two sentences and a score") from None
    return pairs


@torch.no_grad()
def sentence_embeddings(model: Any, tokenizer: Any, sentences: Sequence[str], *, max_length: int) -> Tensor:
    """Mean-pooled token states, unit length: [sentences, D], as sentence-transformers computes them."""
    rows = tokenize_rows(tokenizer, sentences, max_length=max_length)
    assert len(rows) == len(sentences), "a sentence without a token cannot be embedded"
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    pooled = []
    for batch in padded_batches(rows, batch_tokens=BATCH_TOKENS, pad_id=tokenizer.pad_token_id or 0):
        on_device = batch.to(model.device)
        states_BTD = model(input_ids=on_device.input_ids, attention_mask=on_device.attention_mask)[0].float()
        mask_BT1 = on_device.attention_mask.unsqueeze(-1)
        pooled.append(((states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)).cpu())
    embeddings_SD = torch.empty(len(rows), pooled[0].shape[1])
    embeddings_SD[order] = torch.cat(pooled)
    return torch.nn.functional.normalize(embeddings_SD, dim=-1)


def sts_score(model: Any, tokenizer: Any, pairs: Sequence[SentencePair], *, max_length: int = 256) -> float:
    """Spearman correlation x 100 of the embeddings' cosines with the pairs' scores."""
    sentences = [pair.first for pair in pairs] + [pair.second for pair in pairs]
    first_SD, second_SD = sentence_embeddings(model, tokenizer, sentences, max_length=max_length).chunk(2)
    cosines = (first_SD * second_SD).sum(-1).numpy()
    return 100.0 * float(spearmanr(cosines, np.array([pair.score for pair in pairs])).statistic)
