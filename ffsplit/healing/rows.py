"""The rows that healing reads, and which of them each step learns from."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.healing.settings import HealingSettings

SORTED_BATCHES = 16
"""Rows are shuffled, then sorted by length within this many batches, to reduce padding."""


@dataclass(frozen=True)
class HealingData:
    """Token ids of the training rows, and of the validation rows that decide when to stop."""

    rows: Sequence[Sequence[int]]
    validation: Sequence[Sequence[int]]
    pad_id: int
    batch_tokens: int

    def first_batch(self) -> Batch:
        """The first training row alone."""
        return next(padded_batches(self.rows[:1], batch_tokens=self.batch_tokens, pad_id=self.pad_id))

    def validation_batches(self) -> Iterator[Batch]:
        return padded_batches(self.validation, batch_tokens=self.batch_tokens, pad_id=self.pad_id)


def rows_a_step(rows: Sequence[Sequence[int]], settings: HealingSettings) -> int:
    """Rows per step: as many as the settings allow for rows of this mean length."""
    mean_length = sum(map(len, rows)) / max(1, len(rows))
    return max(1, min(settings.batch_rows, int(settings.step_tokens / max(1.0, mean_length))))


def steps_an_epoch(rows: Sequence[Sequence[int]], settings: HealingSettings) -> int:
    return math.ceil(len(rows) / rows_a_step(rows, settings))


def num_epochs(rows: Sequence[Sequence[int]], settings: HealingSettings) -> int:
    """The number of epochs in the settings, or more if `min_steps` requires it."""
    return max(settings.epochs, math.ceil(settings.min_steps / max(1, steps_an_epoch(rows, settings))))


def rows_by_step(
    rows: Sequence[Sequence[int]], settings: HealingSettings, *, seed: int
) -> Iterator[list[Sequence[int]]]:
    """The rows of every step of all epochs, in an order that depends on the seed and the epoch alone."""
    size = rows_a_step(rows, settings)
    for epoch in range(num_epochs(rows, settings)):
        generator = random.Random(f"{seed}/{epoch}")
        order = generator.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), size * SORTED_BATCHES):
            chunk = sorted(order[start : start + size * SORTED_BATCHES], key=lambda row: len(rows[row]))
            groups = [chunk[first : first + size] for first in range(0, len(chunk), size)]
            for group in generator.sample(groups, len(groups)):
                yield [rows[row] for row in group]
