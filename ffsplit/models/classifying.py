"""What a text classifier gives: logits of whole rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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

    Of one label, which is a score, all of it. Rows of tokens go alone through a model that names no padding
    token, which may need one to tell where they end.
    """
    logits = _logits(model, arguments).double()
    return logits if logits.shape[-1] == 1 else logits - logits.mean(-1, keepdim=True)


def _logits(model: Any, arguments: Mapping[str, Tensor]) -> Tensor:
    if "input_ids" not in arguments or getattr(model.config, "pad_token_id", None) is not None:
        logits: Tensor = model(**arguments).logits
        return logits
    rows = []
    for ids_T, mask_T in zip(arguments["input_ids"], arguments["attention_mask"].bool(), strict=True):
        ids_1T = ids_T[mask_T][None]
        rows.append(model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits)
    return torch.cat(rows)
