"""What all tasks have in common when they are scored: batches that keep their order, and the score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ffsplit.calibration.batches import Batch, padded_batches
from ffsplit.models.checkpoint import Checkpoint

BATCH_TOKENS = 4096
NO_LIMIT = 1 << 20


class Score(NamedTuple):
    """One metric of one task. `num_examples` counts rows, or predicted tokens of running text."""

    name: str
    metric: str
    value: float
    num_examples: int
    higher_is_better: bool | None = True


def longest_row(checkpoint: Checkpoint) -> int:
    """The most tokens that the model reads at once; a million where its config sets no limit."""
    return checkpoint.max_positions or NO_LIMIT


def ordered_batches(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int
) -> Iterator[tuple[list[int], Batch]]:
    """Padded batches on the model's device, each with the indices of its texts. Every text is in one.

    A text without a token stands as one padding token, so that it has an answer too. Rows go alone
    through a model that names no padding token, which may need one to tell where rows end.
    """
    longest = min(max_length, tokenizer.model_max_length)
    pad_id = getattr(model.config, "pad_token_id", None)
    batch_tokens = 1 if pad_id is None else BATCH_TOKENS
    encoded = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    rows = [ids or [pad_id or 0] for ids in encoded]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    start = 0
    for batch in padded_batches(rows, batch_tokens=batch_tokens, pad_id=pad_id or 0):
        stop = start + len(batch.input_ids)
        yield order[start:stop], batch.to(model.device)
        start = stop
