"""How a model's calibration text is read."""

from __future__ import annotations

from pydantic import Field

from ffsplit.config import Record
from ffsplit.models.rows import ModelKind

ROW_TOKENS, WINDOW_TOKENS = 128, 512
"""Tokens a row: of an encoder's text, and of a causal language model's windows of running text.

What a window does not reach teaches nothing of those positions, neither a fit nor healing.
"""
SHARD_TOKENS = 16384
MAX_SAMPLED_SHARDS = 64
"""FFN inputs are sampled from at most this many shards, evenly spaced, however many there are."""
FAN_IN = 32
"""Files of statistics that one task reduces at most."""


class CalibrationSettings(Record):
    """How much text is read, and how. Every field changes the statistics' bytes.

    The two fields that default to None depend on the model; `settled` gives them their values.
    """

    samples: int = Field(default=2048, ge=1, description="rows of text")
    max_tokens: int | None = Field(
        default=262144, ge=1, description="fewer rows, where so many hold more tokens than this in all"
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="tokens a row is cut to; by default 512 for causal language models, whose rows are "
        "windows of running text, and 128 for all others, within the model's positions",
    )
    shard_size: int | None = Field(
        default=None, ge=1, description="rows a shard; by default as many as hold 16,384 tokens"
    )
    batch_tokens: int = Field(default=4096, ge=1, description="tokens a batch, padding included")
    sampled_tokens: int = Field(
        default=32768, ge=1, description="tokens whose FFN inputs are kept for refits"
    )
    held_out: int = Field(default=256, ge=1, description="rows kept apart to measure fidelity on")
    held_out_tokens: int = Field(
        default=32768, ge=1, description="fewer of them, where so many hold more tokens than this in all"
    )

    def settled(self, kind: ModelKind, *, max_positions: int | None) -> CalibrationSettings:
        """The same with every field given, for a model of this kind with so many positions, if limited."""
        length = self.max_length
        if length is None:
            length = WINDOW_TOKENS if kind == "causal_lm" else ROW_TOKENS
            length = length if max_positions is None else min(length, max_positions)
        rows = self.shard_size or max(1, SHARD_TOKENS // length)
        return self.model_copy(update={"max_length": length, "shard_size": rows})

    @property
    def row_length(self) -> int:
        """`max_length`, once it is settled."""
        assert self.max_length is not None, "settings are settled before any text is read"
        return self.max_length

    @property
    def rows_a_shard(self) -> int:
        """`shard_size`, once it is settled."""
        assert self.shard_size is not None, "settings are settled before any text is read"
        return self.shard_size
