"""What a text classifier gives: logits of whole rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ffsplit.models.checkpoint import CLASSIFIERS, Checkpoint


def classifies(model: Any) -> bool:
    """Whether a loaded model gives logits of a whole row."""
    return type(model).__name__.endswith(CLASSIFIERS)


def may_search(checkpoint: Checkpoint) -> bool:
    """Whether `allocation: auto` searches: layers matter unevenly, and may have widths that differ."""
    return checkpoint.classifies and not checkpoint.has_experts


def row_logits(model: Any, arguments: Mapping[str, Tensor]) -> Tensor:
    """[rows, labels] in float64, less what all labels of a row have in common, which changes no label.

    Of one label, which is a score, all of it.
    """
    logits: Tensor = model(**arguments).logits.double()
    return logits if logits.shape[-1] == 1 else logits - logits.mean(-1, keepdim=True)
