"""Rows of text to padded batches of tokens, sorted by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Token ids and their mask (1 = token, 0 = padding), both [rows, longest]."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        return self._asdict()

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))


def tokenize_rows(tokenizer: Any, rows: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Token ids of each row, cut to `max_length`; rows of nothing but special tokens are left out."""
    encoded = tokenizer(list(rows), truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return [ids for ids in encoded if any(token not in special for token in ids)]


def padded_batches(rows: Sequence[Sequence[int]], *, batch_tokens: int, pad_id: int) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` tokens, padding included (a longer row is a batch of its own).

    Rows are sorted by length, longest first, so that little is padding and memory peaks at once.
    """
    ordered = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(ordered):
        longest = len(ordered[start])
        chunk = ordered[start : start + max(1, batch_tokens // longest)]
        start += len(chunk)
        ids = torch.full((len(chunk), longest), pad_id, dtype=torch.long)
        mask = torch.zeros((len(chunk), longest), dtype=torch.long)
        for row, tokens in enumerate(chunk):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        yield Batch(ids, mask)
