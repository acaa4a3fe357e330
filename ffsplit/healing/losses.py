"""What healing makes small: the distance of a student's outputs from its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.batches import Batch
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
    """The mean distance over batches, weighted by their tokens."""
    total, num_tokens = total_distance(student, teacher, batches, kind=kind)
    return total / max(1.0, num_tokens)


@torch.no_grad()
def total_distance(
    student: Any, teacher: Any, batches: Sequence[Batch], *, kind: ModelKind
) -> tuple[float, float]:
    """The sum of the batches' distances, each times its tokens; and the number of tokens."""
    total = num_tokens = 0.0
    for batch in batches:
        found = outputs(student, batch, kind=kind)
        expected = outputs(teacher, batch, kind=kind)
        total += float(distance(found, expected, batch, kind=kind)) * batch.num_tokens
        num_tokens += batch.num_tokens
    return total, num_tokens
