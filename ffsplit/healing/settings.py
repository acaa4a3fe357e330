"""How a compressed model is healed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ffsplit.config import Record

STEP_TOKENS, STEP_TOKENS_OF_A_GPU = 2048, 24576


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
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="maximum tokens per step, on average; by default 2,048, and 24,576 for a causal language "
        "model on a GPU",
    )
    learning_rate: float = Field(
        default=5e-4,
        gt=0,
        description="at its peak, for steps of 2,048 tokens; it grows with the square root of their number. "
        "For an encoder twice that, or less if it is close to its original",
    )
    text_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="of what a causal language model minimises: the cross entropy of the text itself",
    )
    states_weight: float = Field(
        default=1.0,
        ge=0,
        description="of the last states' relative squared error, which a causal language model minimises too",
    )
    warm_up: float = Field(default=0.1, ge=0, lt=1, description="share of all steps")
    max_gradient_norm: float = Field(default=1.0, gt=0)
    evaluations: int = Field(default=2, ge=1)
    patience: int = Field(default=6, ge=1)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 on a GPU that has it, otherwise no"
    )
    checkpoint_minutes: float = Field(default=2, ge=0, description="minutes between resumable checkpoints")

    def settled(self, *, large_steps: bool, in_bfloat16: bool) -> HealingSettings:
        """These settings with every field set, for steps that fill a GPU or not, in bfloat16 or not."""
        changes: dict[str, object] = {}
        if self.batch_tokens is None:
            changes["batch_tokens"] = STEP_TOKENS_OF_A_GPU if large_steps else STEP_TOKENS
        if self.mixed_precision == "auto":
            changes["mixed_precision"] = "bf16" if in_bfloat16 else "no"
        return self.model_copy(update=changes)

    @property
    def step_tokens(self) -> int:
        """`batch_tokens`, once it is settled."""
        assert self.batch_tokens is not None, "settings are settled before any row is read"
        return self.batch_tokens
