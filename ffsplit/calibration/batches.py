"""Rows of text to padded batches of tokens, sorted by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffsplit.models.checkpoint import Checkpoint

TOKENIZED_ROWS = 1024
"""Rows that are tokenized at once where they are only counted."""


@dataclass(frozen=True)
class Batch:
    """What a model's forward takes, by name: token ids, masks (1 = token, 0 = padding), pixels or sound.

    All of them begin with the rows of the batch.
    """

    arguments: Mapping[str, Tensor]

    @classmethod
    def of_tokens(cls, input_ids: Tensor, attention_mask: Tensor) -> Batch:
        """Token ids and their mask, both [rows, longest]."""
        return cls({"input_ids": input_ids, "attention_mask": attention_mask})

    @property
    def input_ids(self) -> Tensor:
        return self.arguments["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        return self.arguments["attention_mask"]

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.arguments.values())))

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    def to(self, device: torch.device, *, dtype: torch.dtype | None = None) -> Batch:
        """The same on a device, pixels and sound in the dtype that the model computes in."""
        return Batch(
            {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in self.arguments.items()
            }
        )


def tokenize_rows(tokenizer: Any, rows: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Token ids of each row, cut to `max_length`; rows of nothing but special tokens are left out."""
    encoded = tokenizer(list(rows), truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return [ids for ids in encoded if any(token not in special for token in ids)]


def num_rows_within(tokenizer: Any, rows: Sequence[str], *, max_length: int, max_tokens: int) -> int:
    """How many of the rows, from the first on, hold at most `max_tokens` tokens together; one at least."""
    num_tokens = num_rows = 0
    for start in range(0, len(rows), TOKENIZED_ROWS):
        chunk = list(rows[start : start + TOKENIZED_ROWS])
        for ids in tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]:
            num_tokens += len(ids)
            if num_tokens > max_tokens:
                return max(1, num_rows)
            num_rows += 1
    return num_rows


def pad_id_of(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """The id that fills short rows up: the model's own, by which its head may tell where a row ends.

    That of its tokenizer where the config names none, and 0 where neither does.
    """
    named = checkpoint.text_config.get("pad_token_id")
    if isinstance(named, int) and 0 <= named < checkpoint.vocab_size:
        return named
    return int(tokenizer.pad_token_id or 0)


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
        yield Batch.of_tokens(*padded(chunk, pad_id=pad_id))


def padded(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids padded to the longest row, and their mask, both [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask
