"""What healing makes small: the distance of a student's outputs from its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.readers import Batch
from ffsplit.models.load import classifies, row_logits
from ffsplit.models.rows import ModelKind


def outputs(model: Any, batch: Batch, *, kind: ModelKind) -> Tensor:
    """What is compared: an encoder's last hidden states [B, T, D], a causal LM's logits [B, T, V]."""
    if kind == "encoder":
        base = getattr(model, model.base_model_prefix, model)
        states: Tensor = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return states
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


def distance(student: Tensor, teacher: Tensor, batch: Batch, *, kind: ModelKind) -> Tensor:
    """Encoders: |s - t|^2 / |t|^2 over all tokens. Causal LMs: mean KL(t | s) a token, in nats."""
    is_token = batch.attention_mask.bool()
    student, teacher = student[is_token].float(), teacher[is_token].float()
    if kind == "encoder":
        return (student - teacher).square().sum() / teacher.square().sum()
    log_student = functional.log_softmax(student, dim=-1)
    log_teacher = functional.log_softmax(teacher, dim=-1)
    return functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def weight(teacher: Tensor, batch: Batch, *, kind: ModelKind) -> Tensor:
    """What `distance` divides by. Weighted by it, the distances of parts of a batch add up to the whole's."""
    is_token = batch.attention_mask.bool()
    if kind == "encoder":
        return teacher[is_token].float().square().sum()
    return is_token.sum().float()


def mean_distance(student: Any, teacher: Any, batches: Sequence[Batch], *, kind: ModelKind) -> float:
    """What a student is judged by: its distance over all batches, as `total_distance` has it."""
    return quotient(*total_distance(student, teacher, batches, kind=kind))


def quotient(total: float, weight: float) -> float:
    return total / weight if weight > 0 else 0.0


@torch.no_grad()
def total_distance(
    student: Any, teacher: Any, batches: Sequence[Batch], *, kind: ModelKind
) -> tuple[float, float]:
    """What the distance is a quotient of: sums over the batches, which add up over parts of them.

    The batches' distances, each times its tokens, and the tokens. Of a classifier the squared error of its
    logits and their square: states that its head does not read are no part of what it gives.
    """
    total = weights = 0.0
    for batch in batches:
        if classifies(teacher):
            s_BL, t_BL = (row_logits(model, batch.arguments) for model in (student, teacher))
            total += float((s_BL - t_BL).square().sum())
            weights += float(t_BL.square().sum())
            continue
        found, expected = (outputs(model, batch, kind=kind) for model in (student, teacher))
        total += float(distance(found, expected, batch, kind=kind)) * batch.num_tokens
        weights += batch.num_tokens
    return total, weights
