"""Turns rows of text, and of a text and its target, into arguments of a model's forward.

A row is a string: a text, or a JSON list of a source and its target.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import load_tokenizer

# Rows of text to padded batches of tokens, sorted by length.

TOKENIZED_ROWS = 1024
"""Rows tokenized at once when their tokens are only counted."""


@dataclass(frozen=True)
class Batch:
    """The arguments of a model's forward: token ids, masks (1 = token, 0 = padding), pixels or sound.

    The first dimension of the first argument is the batch's rows. `is_text` [rows, length] tells the tokens
    of a text from padding, and from places of pictures or sounds; None: all that the mask marks are.
    """

    arguments: Mapping[str, Tensor]
    is_text: Tensor | None = None

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

    @property
    def predicted(self) -> tuple[Tensor, Tensor]:
        """The token ids that a decoder reads, and which of them it can predict, both [rows, length].

        Those are the tokens of a text that follow another token of their row.
        """
        start = "decoder_" if "decoder_input_ids" in self.arguments else ""
        ids = self.arguments[f"{start}input_ids"]
        mask = self.arguments.get(f"{start}attention_mask")
        is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        is_text = is_token if start or self.is_text is None else is_token & self.is_text
        follows = torch.zeros_like(is_token)
        follows[:, 1:] = is_token[:, :-1] & is_text[:, 1:]
        return ids, follows

    def to(self, device: torch.device, *, dtype: torch.dtype | None = None) -> Batch:
        """The same on a device, with pixels and sound in the dtype that the model computes in."""
        moved = {name: on_device(tensor, device) for name, tensor in self.arguments.items()}
        if dtype is not None:
            moved = {
                name: each.to(dtype) if each.is_floating_point() else each for name, each in moved.items()
            }
        return Batch(moved, None if self.is_text is None else on_device(self.is_text, device))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to a GPU is queued there: neither waits for the other."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def tokenize_rows(tokenizer: Any, rows: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Token ids of each row, cut to `max_length`; rows with only special tokens are left out."""
    encoded = tokenizer(list(rows), truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return [ids for ids in encoded if any(token not in special for token in ids)]


def num_rows_within(tokenizer: Any, rows: Sequence[str], *, max_length: int, max_tokens: int) -> int:
    """How many of the rows, from the first on, hold at most `max_tokens` tokens together; at least one."""
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
    """The padding id: the model's own, because its head may use that to find where a row ends.

    It is the tokenizer's if the config names none, and 0 if neither does.
    """
    named = checkpoint.text_config.get("pad_token_id")
    if isinstance(named, int) and 0 <= named < checkpoint.vocab_size:
        return named
    return int(tokenizer.pad_token_id or 0)


def ordinary_ids(tokenizer: Any) -> list[int]:
    """The ids of a tokenizer's vocabulary that are no special tokens, ascending."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def padded_batches(rows: Sequence[Sequence[int]], *, batch_tokens: int, pad_id: int) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` tokens, padding included (a longer row is a batch of its own).

    Rows are sorted by length, longest first, so that there is little padding and memory peaks early.
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


class TextReader:
    """One text per row."""

    def __init__(self, checkpoint: Checkpoint, *, max_length: int, batch_tokens: int) -> None:
        self.tokenizer = load_tokenizer(checkpoint)
        self._pad_id = pad_id_of(checkpoint, self.tokenizer)
        self._max_length, self._batch_tokens = max_length, batch_tokens

    def encode(self, rows: Sequence[str]) -> list[list[int]]:
        return tokenize_rows(self.tokenizer, rows, max_length=self._max_length)

    def batches(self, encoded: Sequence[list[int]]) -> Iterator[Batch]:
        return padded_batches(encoded, batch_tokens=self._batch_tokens, pad_id=self._pad_id)

    def num_tokens(self, encoded: Sequence[list[int]]) -> dict[str, int]:
        return {"attention_mask": sum(map(len, encoded))}


class PairReader:
    """A source and its target per row; the decoder reads the target shifted by one token."""

    def __init__(self, checkpoint: Checkpoint, *, max_length: int, batch_tokens: int) -> None:
        self._tokenizer = load_tokenizer(checkpoint)
        self._pad_id = self._tokenizer.pad_token_id or 0
        self._decoder = DecoderInputs(checkpoint, self._tokenizer, max_length=max_length)
        self._max_length, self._batch_tokens = max_length, batch_tokens

    def encode(self, rows: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        pairs = []
        for source, target in map(json.loads, rows):
            ids = tokenize_rows(self._tokenizer, [source], max_length=self._max_length)
            if ids:
                pairs.append((ids[0], self._decoder.ids(target)))
        return pairs

    def batches(self, encoded: Sequence[tuple[list[int], list[int]]]) -> Iterator[Batch]:
        ordered = sorted(encoded, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
        start = 0
        while start < len(ordered):
            size = max(1, self._batch_tokens // len(ordered[start][0]))
            chunk = ordered[start : start + size]
            start += size
            ids, mask = padded([source for source, _ in chunk], pad_id=self._pad_id)
            decoder = self._decoder.arguments([target for _, target in chunk])
            yield Batch({"input_ids": ids, "attention_mask": mask, **decoder})

    def num_tokens(self, encoded: Sequence[tuple[list[int], list[int]]]) -> dict[str, int]:
        return {
            "attention_mask": sum(len(source) for source, _ in encoded),
            "decoder_attention_mask": sum(len(target) for _, target in encoded),
        }


_DECODER_PARTS = ("decoder", "text_config")
"""Parts of a config that are about the decoder of a model with other towers."""


class DecoderInputs:
    """A decoder's inputs for a target: the start token, then the target without its last token."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, *, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._pad_id = tokenizer.pad_token_id or 0
        configs = (checkpoint.config, *(checkpoint.config.get(part) or {} for part in _DECODER_PARTS))
        names = ("decoder_start_token_id", "bos_token_id")
        stated = [config.get(name) for name in names for config in configs]
        self._start = next(each for each in (*stated, self._pad_id) if isinstance(each, int))

    def ids(self, target: str) -> list[int]:
        encoded = self._tokenizer(text_target=target, truncation=True, max_length=self._max_length)
        return [self._start, *encoded["input_ids"][:-1]]

    def arguments(self, targets: Sequence[list[int]]) -> dict[str, Tensor]:
        ids, mask = padded(targets, pad_id=self._pad_id)
        return {"decoder_input_ids": ids, "decoder_attention_mask": mask}
