"""Turns the rows of a run into arguments of its model's forward: one reader per kind of model.

A row is a string: a text, or a JSON list. The list holds a source and its target, or an encoded picture or
sound and, if the model also reads one, a text.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ffsplit.calibration.media import decode_sound
from ffsplit.errors import ConfigError, explained
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import load_processor, load_tokenizer

# Rows of text to padded batches of tokens, sorted by length.

TOKENIZED_ROWS = 1024
"""Rows tokenized at once when their tokens are only counted."""


@dataclass(frozen=True)
class Batch:
    """The arguments of a model's forward: token ids, masks (1 = token, 0 = padding), pixels or sound.

    The first dimension of each is the batch's rows.
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
        """The same on a device, with pixels and sound in the dtype that the model computes in."""
        return Batch(
            {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in self.arguments.items()
            }
        )


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


Encoded = Any
MEDIA_BATCH_ROWS = 8


class Reader(Protocol):
    """Turns rows into batches; `encode` leaves out empty rows."""

    def encode(self, rows: Sequence[str]) -> list[Encoded]: ...

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[Batch]: ...

    def num_tokens(self, encoded: Sequence[Encoded]) -> Mapping[str, int]:
        """Number of tokens without padding, by the name of their mask."""
        ...


def make_reader(checkpoint: Checkpoint, *, max_length: int, batch_tokens: int) -> Reader:
    """The reader of a checkpoint's rows. Raises ConfigError when its tokenizer or processor is missing."""
    kind = checkpoint.kind
    if kind in ("encoder", "causal_lm"):
        return TextReader(checkpoint, max_length=max_length, batch_tokens=batch_tokens)
    if kind == "seq2seq":
        return PairReader(checkpoint, max_length=max_length, batch_tokens=batch_tokens)
    if kind in ("image", "image_text"):
        return ImageReader(checkpoint, max_length=max_length)
    return SoundReader(checkpoint, max_length=max_length)


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


class DecoderInputs:
    """A decoder's inputs for a target: the start token, then the target without its last token."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, *, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        config = checkpoint.config
        self._pad_id = tokenizer.pad_token_id or 0
        start = config.get("decoder_start_token_id")
        self._start = next(
            each for each in (start, config.get("bos_token_id"), self._pad_id) if isinstance(each, int)
        )

    def ids(self, target: str) -> list[int]:
        encoded = self._tokenizer(text_target=target, truncation=True, max_length=self._max_length)
        return [self._start, *encoded["input_ids"][:-1]]

    def arguments(self, targets: Sequence[list[int]]) -> dict[str, Tensor]:
        ids, mask = padded(targets, pad_id=self._pad_id)
        return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


class ImageReader:
    """A picture per row, through the model's own processor, and a text if the model reads one."""

    def __init__(self, checkpoint: Checkpoint, *, max_length: int) -> None:
        self._processor = load_processor(checkpoint, "image")
        self._has_text = checkpoint.kind == "image_text"
        self._tokenizer = load_tokenizer(checkpoint) if self._has_text else None
        self._has_mask = any(ffn.tower.mask for ffn in checkpoint.ffns)
        longest = checkpoint.max_positions
        self._max_length = max_length if longest is None else min(max_length, longest)
        self._padded_length = longest

    def encode(self, rows: Sequence[str]) -> list[list[str]]:
        return [json.loads(row) for row in rows]

    def batches(self, encoded: Sequence[list[str]]) -> Iterator[Batch]:
        for start in range(0, len(encoded), MEDIA_BATCH_ROWS):
            chunk = encoded[start : start + MEDIA_BATCH_ROWS]
            images = [_image(row[0]) for row in chunk]
            arguments = {"pixel_values": self._processor(images=images, return_tensors="pt")["pixel_values"]}
            if self._has_text:
                arguments |= self._text([row[1] for row in chunk])
            yield Batch(arguments)

    def _text(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids padded to the longest text, with a mask; without masks, padded to the full length."""
        assert self._tokenizer is not None
        options: dict[str, Any] = {"padding": True, "max_length": self._max_length}
        if not self._has_mask:
            options = {"padding": "max_length", "max_length": self._padded_length}
        found = self._tokenizer(texts, truncation=True, return_tensors="pt", **options)
        names = ("input_ids", "attention_mask") if self._has_mask else ("input_ids",)
        return {name: found[name] for name in names}

    def num_tokens(self, encoded: Sequence[list[str]]) -> dict[str, int]:
        if not self._has_mask:
            return {}
        masks = (self._text([row[1]])["attention_mask"] for row in encoded)
        return {"attention_mask": sum(int(mask.sum()) for mask in masks)}


FEATURE_MASKS = ("attention_mask", "feature_attention_mask", "input_features_mask")
"""What feature extractors call the mask of the frames that hold sound, where they return one."""


class SoundReader:
    """A sound per row, through the model's own feature extractor, and its transcript for a decoder.

    If the extractor returns plain sound, rows are cut to `max_length` tenths of a second and batched by
    length, so that there is no padding.
    """

    def __init__(self, checkpoint: Checkpoint, *, max_length: int) -> None:
        self._processor = load_processor(checkpoint, "sound")
        self._rate = int(self._processor.sampling_rate)
        self._decoder = None
        if checkpoint.kind == "speech":
            self._decoder = DecoderInputs(checkpoint, load_tokenizer(checkpoint), max_length=max_length)
        self._longest = max_length * self._rate // 10

    def encode(self, rows: Sequence[str]) -> list[tuple[Any, list[int]]]:
        encoded: list[tuple[Any, list[int]]] = []
        for row in map(json.loads, rows):
            sound = decode_sound(base64.b64decode(row[0]), rate=self._rate)
            if self._decoder is None:
                encoded.append((sound[: self._longest], []))
            else:
                encoded.append((sound, self._decoder.ids(row[1])))
        return encoded

    def batches(self, encoded: Sequence[tuple[Any, list[int]]]) -> Iterator[Batch]:
        by_length: dict[int, list[tuple[Any, list[int]]]] = {}
        for sound, ids in encoded:
            by_length.setdefault(len(sound) if self._decoder is None else 0, []).append((sound, ids))
        for _, rows in sorted(by_length.items(), reverse=True):
            for start in range(0, len(rows), MEDIA_BATCH_ROWS):
                chunk = rows[start : start + MEDIA_BATCH_ROWS]
                sounds = [sound for sound, _ in chunk]
                found = self._processor(sounds, sampling_rate=self._rate, return_tensors="pt")
                name = "input_values" if "input_values" in found else "input_features"
                arguments = {name: found[name].to(torch.float32)}
                if name == "input_features":
                    arguments |= {mask: found[mask] for mask in FEATURE_MASKS if mask in found}
                if self._decoder is not None:
                    arguments |= self._decoder.arguments([ids for _, ids in chunk])
                yield Batch(arguments)

    def num_tokens(self, encoded: Sequence[tuple[Any, list[int]]]) -> dict[str, int]:
        if self._decoder is None:
            return {}
        return {"decoder_attention_mask": sum(len(ids) for _, ids in encoded)}


def _image(encoded: str) -> Any:
    """Decode a picture. Raises ConfigError when it is invalid, or Pillow is missing."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("pictures need Pillow: pip install 'ffsplit[image]'") from None
    with explained("a calibration picture cannot be decoded", advice="remove it"):
        return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
