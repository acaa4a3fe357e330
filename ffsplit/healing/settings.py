"""How a compressed model is healed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ffsplit.config import Record


class HealingSettings(Record):
    """AdamW over every weight but the embeddings, linear warm-up, then a half cosine to zero.

    If `epochs` of the text are fewer than `min_steps` steps, there are more epochs. The model is evaluated on
    validation rows `epochs * evaluations` times. Healing stops after `patience` evaluations in a row that are
    no better than the best, and returns the best state, which may be the initial one. The distance may rise
    while the learning rate is high and fall only at the end, so patience should outlast that.
    """

    epochs: int = Field(default=3, ge=1)
    min_steps: int = Field(default=0, ge=0)
    batch_rows: int = Field(default=64, ge=1, description="maximum rows per step")
    batch_tokens: int = Field(default=2048, ge=1, description="maximum tokens per step, on average")
    learning_rate: float = Field(
        default=5e-4,
        gt=0,
        description="at its peak; for an encoder twice that, or less if it is close to its original",
    )
    warm_up: float = Field(default=0.1, ge=0, lt=1, description="share of all steps")
    max_gradient_norm: float = Field(default=1.0, gt=0)
    evaluations: int = Field(default=2, ge=1)
    patience: int = Field(default=6, ge=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_steps: int = Field(default=100, ge=1, description="steps between resumable checkpoints")
