"""Which texts a run calibrates on, and which it holds out to evaluate the result."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from ffsplit.config import Record
from ffsplit.errors import ConfigError

# How a model's calibration text is read.

ROW_TOKENS, WINDOW_TOKENS = 128, 512
"""Tokens per row: of an encoder's text, and of a causal language model's windows of running text.

Neither a fit nor healing learns anything about positions beyond the window.
"""
SHARD_TOKENS = 16384
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, SHARD_TOKENS
"""Tokens per batch by default. A GPU needs many to be busy; a shard has no more."""
COMPARED_TOKENS = 4096
MAX_SAMPLED_SHARDS = 64
"""FFN inputs are sampled from at most this many shards, evenly spaced, however many there are."""
FAN_IN = 32
"""Upper limit on statistics files that one task reduces."""


class CalibrationSettings(Record):
    """How much text is read, and how. Every field changes the statistics' bytes.

    The fields that default to None depend on the model or the device; `settled` gives them their values.
    """

    samples: int = Field(default=2048, ge=1, description="rows of text")
    max_tokens: int | None = Field(
        default=262144, ge=1, description="upper limit on tokens; rows beyond it are left out"
    )
    max_tokens_on_gpu: int | None = Field(
        default=None,
        ge=1,
        description="the same for causal language models on GPUs; by default as elsewhere",
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="maximum tokens per row; by default 512 for causal language models, whose rows are "
        "windows of running text, and 128 for all others, within the model's positions",
    )
    shard_size: int | None = Field(
        default=None, ge=1, description="rows per shard; by default as many as hold 16,384 tokens"
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens per batch, padding included; by default 4,096 on CPUs and 16,384 on GPUs",
    )
    sampled_tokens: int = Field(
        default=32768, ge=1, description="tokens whose FFN inputs are kept for refits"
    )
    held_out: int = Field(default=256, ge=1, description="rows held out to measure fidelity")
    held_out_tokens: int = Field(
        default=32768, ge=1, description="upper limit on their tokens; rows beyond it are left out"
    )
    own_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="of the rows, written by the model itself if it is a causal language model and "
        "--calibration names neither self: nor shares",
    )

    def reading(self, *, samples: int | None, max_length: int | None) -> CalibrationSettings:
        """These settings with the given values. A given number of rows has no limit on tokens."""
        changes: dict[str, int | None] = {}
        if samples is not None:
            changes = {"samples": samples, "max_tokens": None, "max_tokens_on_gpu": None}
        if max_length is not None:
            changes["max_length"] = max_length
        return self.model_copy(update=changes)

    def settled(
        self, *, windows: bool, max_positions: int | None, on_gpu: bool = False
    ) -> CalibrationSettings:
        """The same with every field set, for rows that are windows of running text or not.

        `max_positions` None: no limit.
        """
        length = self.max_length
        if length is None:
            length = WINDOW_TOKENS if windows else ROW_TOKENS
            length = length if max_positions is None else min(length, max_positions)
        rows = self.shard_size or max(1, SHARD_TOKENS // length)
        batch = self.batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
        changes: dict[str, object] = {"max_length": length, "shard_size": rows, "batch_tokens": batch}
        if not windows:
            changes["own_share"] = 0.0
        if windows and on_gpu and self.max_tokens_on_gpu is not None:
            changes["max_tokens"] = self.max_tokens_on_gpu
        return self.model_copy(update=changes)

    @property
    def most_rows(self) -> int:
        """Upper limit on rows that are as long as they may be."""
        limit = self.samples if self.max_tokens is None else self.max_tokens // self.row_length
        return max(1, min(self.samples, limit))

    def beside(self, own_rows: int) -> CalibrationSettings:
        """The settings for the rows that are read, beside those that the model writes itself."""
        if self.max_tokens is None or not own_rows:
            return self
        left = max(self.row_length, self.max_tokens - own_rows * self.row_length)
        return self.model_copy(update={"max_tokens": left})

    @property
    def row_length(self) -> int:
        """`max_length`, once it is settled."""
        assert self.max_length is not None, "settings are settled before any text is read"
        return self.max_length

    @property
    def tokens_per_batch(self) -> int:
        """`batch_tokens`, once it is settled."""
        assert self.batch_tokens is not None, "settings are settled before any text is read"
        return self.batch_tokens

    @property
    def compared_tokens(self) -> int:
        """Tokens per batch where outputs are compared: few, since logits take memory by the vocabulary."""
        return min(self.tokens_per_batch, COMPARED_TOKENS)

    @property
    def rows_per_shard(self) -> int:
        """`shard_size`, once it is settled."""
        assert self.shard_size is not None, "settings are settled before any text is read"
        return self.shard_size


_SPACE = re.compile(r"\s")
_NOT_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class TextSample:
    """Calibration and held-out rows, each in a seeded shuffled order, without duplicates."""

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_is_disjoint: bool
    """False only when there was a single distinct text, which then serves for both."""
    digest: str
    """sha256 over all lists, 64 hex digits."""
    validation: tuple[str, ...] = ()
    """Rows to choose between candidates, neither calibrated on nor held out; empty unless requested."""
    own_validation: tuple[str, ...] = ()
    """More such rows, which the model wrote itself."""

    @classmethod
    def empty(cls) -> TextSample:
        """No rows: the model writes them all."""
        return cls((), (), True, _digest((), ()))

    def with_own(
        self, calibration: Sequence[str], validation: Sequence[str], held_out: Sequence[str]
    ) -> TextSample:
        """The sample with rows that the model wrote itself, spread evenly among the others."""
        merged = interleaved([self.calibration, calibration])
        held = (*self.held_out, *held_out)
        own = tuple(validation)
        digest = _digest(merged, held, (*self.validation, *own))
        return TextSample(merged, held, self.held_out_is_disjoint, digest, self.validation, own)

    def mapped(self, change: Callable[[str], str]) -> TextSample:
        """The same sample with every row changed, and a new digest."""
        calibration, held_out, validation = (
            tuple(map(change, rows)) for rows in (self.calibration, self.held_out, self.validation)
        )
        digest = _digest(calibration, held_out, validation)
        return TextSample(calibration, held_out, self.held_out_is_disjoint, digest, validation)

    def first(self, num_rows: int, *, held_out: int, validation: int) -> TextSample:
        """The sample with only the first rows of each part, up to these numbers."""
        parts = self.calibration[:num_rows], self.held_out[:held_out], self.validation[:validation]
        digest = _digest(*(parts if parts[2] else parts[:2]))
        return TextSample(parts[0], parts[1], self.held_out_is_disjoint, digest, parts[2])


def sample_texts(
    texts: Sequence[str], *, num_samples: int, num_held_out: int, seed: int, num_validation: int = 0
) -> TextSample:
    """Split the distinct texts into at most `num_samples` for calibration and a held-out part.

    `num_held_out` texts are held out, or a tenth of all texts (at least one) if that is fewer. The choice
    does not depend on `num_samples`, and a larger sample begins with the smaller one. The same arguments
    give the same bytes on every platform. The `num_validation` texts after the calibration set are for
    choosing between candidates; if too few are left, calibration gives up at most a tenth. Raises
    ConfigError when there is no text, or too little to choose by.
    """
    assert num_samples >= 1 and num_held_out >= 1, "both parts need at least one text"
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        raise ConfigError("no text to sample: name a calibration source with text in it")
    order = random.Random(seed).sample(range(len(distinct)), len(distinct))
    shuffled = tuple(distinct[index] for index in order)
    size = min(num_held_out, max(1, len(distinct) // 10))
    is_disjoint = len(distinct) > 1
    held_out = shuffled[:size]
    calibration = shuffled[size : size + num_samples] if is_disjoint else shuffled
    if not num_validation:
        return TextSample(calibration, held_out, is_disjoint, _digest(calibration, held_out))
    rest = shuffled[size:]
    if len(rest) < 2:
        raise ConfigError(
            "a search over the layers, or healing, needs rows to choose by: give at least three distinct ones"
        )
    spare = min(num_validation, max(len(rest) - num_samples, len(rest) // 10, 1))
    calibration = rest[: min(num_samples, len(rest) - spare)]
    validation = rest[len(calibration) : len(calibration) + spare]
    return TextSample(calibration, held_out, True, _digest(calibration, held_out, validation), validation)


def interleaved(parts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The rows of all parts in one order, in which every beginning has about the same share of each part."""
    places = [
        ((index + 0.5) / len(part), number, row)
        for number, part in enumerate(parts)
        for index, row in enumerate(part)
    ]
    return tuple(row for _, _, row in sorted(places, key=lambda place: place[:2]))


def joined(samples: Sequence[TextSample]) -> TextSample:
    """Samples of several sources as one, whose rows are spread evenly. A row of two sources is there once."""
    calibration, held_out, validation = (
        tuple(dict.fromkeys(interleaved(parts)))
        for parts in (
            [sample.calibration for sample in samples],
            [sample.held_out for sample in samples],
            [sample.validation for sample in samples],
        )
    )
    elsewhere = {*held_out, *validation}
    calibration = tuple(row for row in calibration if row not in elsewhere) or calibration
    is_disjoint = all(sample.held_out_is_disjoint for sample in samples)
    digest = _digest(calibration, held_out, validation)
    return TextSample(calibration, held_out, is_disjoint, digest, validation)


def passages(texts: Sequence[str], *, max_characters: int) -> list[str]:
    """Running text in windows, for causal models: consecutive texts joined by a newline.

    Every passage but the last has at least `max_characters` and at most twice that. A text longer than
    `max_characters` is cut, at white space if there is some; only white space is ever lost.
    """
    assert max_characters >= 1, "a passage needs at least one character"
    windows: list[str] = []
    pending = ""
    for text in texts:
        joined = f"{pending}\n{text}" if pending else text
        pieces = _cut(joined, size=max_characters) if len(text) > max_characters else [joined]
        *full, pending = pieces
        windows += full
        if len(pending) >= max_characters:
            windows.append(pending)
            pending = ""
    return [*windows, pending] if pending else windows


def shard(rows: Sequence[str], *, shard_size: int) -> list[tuple[str, ...]]:
    """Consecutive rows in groups of `shard_size`; the last group may be smaller."""
    assert shard_size >= 1, "a shard needs at least one row"
    return [tuple(rows[start : start + shard_size]) for start in range(0, len(rows), shard_size)]


def _cut(text: str, *, size: int) -> list[str]:
    """Pieces of `size` characters, each extended to the next white space or to the end.

    If neither comes within another `size` characters (some scripts write no spaces), the piece is cut at
    `size`.
    """
    pieces = []
    start = 0
    while len(text) - start > size:
        limit = start + 2 * size
        space = _SPACE.search(text, start + size, limit)
        end = space.start() if space else len(text) if len(text) <= limit else start + size
        pieces.append(text[start:end])
        following = _NOT_SPACE.search(text, end)
        start = following.start() if following else len(text)
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _digest(*groups: Sequence[str]) -> str:
    """sha256 over groups of texts. Counts and lengths are included as 8 bytes, so no two splits collide."""
    state = hashlib.sha256()
    for group in groups:
        state.update(len(group).to_bytes(8, "big"))
        for text in group:
            data = text.encode("utf-8", "surrogatepass")
            state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()
