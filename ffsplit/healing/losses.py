"""What healing minimises: the distance of a student's outputs from its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.model_inputs import Batch
from ffsplit.models.family import Makes
from ffsplit.models.load import classifies, row_logits
from ffsplit.models.names import base_of


def outputs(model: Any, batch: Batch, *, makes: Makes) -> Tensor:
    """The outputs to compare: an encoder's last hidden states [B, T, D], a causal LM's logits [B, T, V]."""
    if makes == "states":
        base = base_of(model)
        states: Tensor = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return states
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


def distance(student: Tensor, teacher: Tensor, batch: Batch, *, makes: Makes) -> Tensor:
    """Encoders: |s - t|^2 / |t|^2 over all tokens. Causal LMs: mean KL(t | s) per token, in nats."""
    is_token = batch.attention_mask.bool()
    student, teacher = student[is_token].float(), teacher[is_token].float()
    if makes == "states":
        return (student - teacher).square().sum() / teacher.square().sum()
    log_student = functional.log_softmax(student, dim=-1)
    log_teacher = functional.log_softmax(teacher, dim=-1)
    return functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def weight(teacher: Tensor, batch: Batch, *, makes: Makes) -> Tensor:
    """The divisor in `distance`. Weighted by it, distances of parts of a batch average to the whole's."""
    is_token = batch.attention_mask.bool()
    if makes == "states":
        return teacher[is_token].float().square().sum()
    return is_token.sum().float()


def mean_distance(student: Any, teacher: Any, batches: Sequence[Batch], *, makes: Makes) -> float:
    """A student's loss: its distance over all batches, the quotient of `total_distance`."""
    return quotient(*total_distance(student, teacher, batches, makes=makes))


def quotient(total: float, weight: float) -> float:
    return total / weight if weight > 0 else 0.0


@torch.no_grad()
def total_distance(
    student: Any, teacher: Any, batches: Sequence[Batch], *, makes: Makes
) -> tuple[float, float]:
    """Numerator and denominator of the distance: sums over the batches, which can be added over parts.

    They are the distances times the batches' tokens, and the tokens. For a classifier, they are the squared
    error of its logits and their square, because its head does not read all states.
    """
    total = weights = 0.0
    for batch in batches:
        if classifies(teacher):
            s_BL, t_BL = (row_logits(model, batch.arguments) for model in (student, teacher))
            total += float((s_BL - t_BL).square().sum())
            weights += float(t_BL.square().sum())
            continue
        found, expected = (outputs(model, batch, makes=makes) for model in (student, teacher))
        total += float(distance(found, expected, batch, makes=makes)) * batch.num_tokens
        weights += batch.num_tokens
    return total, weights
