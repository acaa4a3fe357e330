"""What healing minimises: the distance of a student's outputs from its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.model_inputs import Batch
from ffsplit.models.family import Makes
from ffsplit.models.load import classifies, row_logits
from ffsplit.models.names import base_of

CHUNK_LOGITS = 1 << 26
"""Logits of a vocabulary that are computed at once: 256 MiB in float32."""
NO_LABEL = -100
"""Of a token that none follows, the last of its row."""
SAME_LOGITS = 1e-3
"""Relative to the largest: how far the head's logits may be from the model's own, in any dtype."""


@dataclass(frozen=True)
class Distance:
    """The distance of a student from its teacher over the tokens of a batch, and its gradient.

    Encoders: |s - t|^2 / |t|^2 of their last states. Causal language models: mean KL(t | s) per token, in
    nats. Their logits are computed from the last states in chunks of tokens, so that a large vocabulary is
    never the memory peak; `has_heads` is false for a model that changes the logits of its head, whose logits
    are computed all at once.

    What is minimised for a causal language model may be more than the distance: `text_share` of it is the
    cross entropy of the text itself, and `states_weight` times |s - t|^2 / |t|^2 of the last states is added
    where they are at hand.
    """

    student: Any
    teacher: Any
    makes: Makes
    has_heads: bool
    text_share: float = 0.0
    states_weight: float = 0.0

    @classmethod
    def of(
        cls,
        student: Any,
        teacher: Any,
        batch: Batch,
        *,
        makes: Makes,
        text_share: float = 0.0,
        states_weight: float = 0.0,
    ) -> Distance:
        """A distance that was tried on a batch."""
        if makes != "next_tokens":
            return cls(student, teacher, makes, has_heads=False)
        has_heads = head_makes_logits(teacher, batch)
        return cls(student, teacher, makes, has_heads, text_share, states_weight)

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """What is compared, or what its logits are computed from, for the batch's tokens: [T, D]."""
        of_states = self.has_heads or self.makes == "states"
        found = last_states(model, batch) if of_states else logits_of(model, batch)
        return found[batch.attention_mask.bool()]

    def weight(self, target_TD: Tensor) -> Tensor:
        """The divisor in the distance. Weighted by it, parts' distances average to the whole's."""
        if self.makes == "states":
            return target_TD.float().square().sum()
        return torch.tensor(float(len(target_TD)), device=target_TD.device)

    def backward(self, batch: Batch, target_TD: Tensor, *, factor: Tensor, accelerator: Any) -> None:
        """Add the gradient of what is minimised, times its weight times `factor`, to the student's weights.

        `target_TD` are the teacher's `outputs` for the batch.
        """
        labels_T = next_tokens(batch) if self.text_share else None
        with accelerator.autocast():
            found_TD = self.outputs(self.student, batch)
        if not self.has_heads:
            accelerator.backward(self._minimised(found_TD, target_TD, labels_T) * factor)
            return
        leaf_TD = found_TD.detach().requires_grad_()
        *most, last = self._chunks(target_TD)
        with self._whole_heads() as (student_head, teacher_head):
            for part in (*most, last):
                add_up_gradients(student_head, now=part is last)
                with accelerator.autocast():
                    student_TV = student_head(leaf_TD[part])
                with torch.no_grad():
                    teacher_TV = teacher_head(target_TD[part])
                labels = None if labels_T is None else labels_T[part]
                accelerator.backward(self._minimised(student_TV, teacher_TV, labels) * factor)
        gradient_TD = leaf_TD.grad
        assert gradient_TD is not None, "the head reads the states"
        if self.states_weight:
            scale = 2 * self.states_weight * factor / target_TD.float().square().sum(-1).mean()
            gradient_TD += (scale * (found_TD.detach().float() - target_TD.float())).to(gradient_TD.dtype)
        torch.autograd.backward(found_TD, gradient_TD)

    @torch.no_grad()
    def totals(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Numerator and denominator of the distance: sums over the batches, which can be added over parts.

        They are the distances times the batches' tokens, and the tokens. For a classifier, they are the
        squared error of its logits and their square, because its head does not read all states.
        """
        total = weights = 0.0
        for batch in batches:
            if classifies(self.teacher):
                s_BL, t_BL = (row_logits(model, batch.arguments) for model in (self.student, self.teacher))
                total += float((s_BL - t_BL).square().sum())
                weights += float(t_BL.square().sum())
                continue
            found_TD, target_TD = (self.outputs(model, batch) for model in (self.student, self.teacher))
            weight = batch.num_tokens / float(self.weight(target_TD))
            if self.has_heads:
                with self._whole_heads() as (student_head, teacher_head):
                    for part in self._chunks(target_TD):
                        logits = student_head(found_TD[part]), teacher_head(target_TD[part])
                        total += weight * float(self._sum(*logits))
            else:
                total += weight * float(self._sum(found_TD, target_TD))
            weights += batch.num_tokens
        return total, weights

    def mean(self, batches: Sequence[Batch]) -> float:
        """The student's loss: its distance over all batches."""
        return quotient(*self.totals(batches))

    def _sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of some tokens' outputs times its weight."""
        if self.makes == "states":
            return (student.float() - teacher.float()).square().sum()
        log_student = functional.log_softmax(student.float(), dim=-1)
        log_teacher = functional.log_softmax(teacher.float(), dim=-1)
        return functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum")

    def _minimised(self, student: Tensor, teacher: Tensor, labels_T: Tensor | None) -> Tensor:
        """What is minimised of some tokens' outputs, times its weight, but for the states' part."""
        distance = self._sum(student, teacher)
        if labels_T is None:
            return distance
        text = functional.cross_entropy(student.float(), labels_T, ignore_index=NO_LABEL, reduction="sum")
        return (1 - self.text_share) * distance + self.text_share * text

    @contextmanager
    def _whole_heads(self) -> Iterator[tuple[Any, Any]]:
        heads = self.student.get_output_embeddings(), self.teacher.get_output_embeddings()
        with whole(heads[0]), whole(heads[1]):
            yield heads

    def _chunks(self, target_TD: Tensor) -> Iterator[slice]:
        size = max(1, CHUNK_LOGITS // self.teacher.get_output_embeddings().weight.shape[0])
        return (slice(start, start + size) for start in range(0, len(target_TD), size))


@contextmanager
def whole(module: Any) -> Iterator[None]:
    """Gather a divided module's weights once for all calls in this context. Other modules are whole."""
    is_divided = hasattr(module, "unshard")
    if is_divided:
        module.unshard()
    try:
        yield
    finally:
        if is_divided:
            module.reshard()


def add_up_gradients(module: Any, *, now: bool) -> None:
    """Add up a divided module's gradients over the processes in the next backward pass, or keep them."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(now)


def next_tokens(batch: Batch) -> Tensor:
    """The id of the token that follows each of the batch's tokens, or NO_LABEL: [T]."""
    is_token = batch.attention_mask.bool()
    following = torch.full_like(batch.input_ids, NO_LABEL)
    following[:, :-1] = torch.where(is_token[:, 1:], batch.input_ids[:, 1:], NO_LABEL)
    return following[is_token]


def last_states(model: Any, batch: Batch) -> Tensor:
    """The last hidden states of a batch of texts: [B, T, D]."""
    base = base_of(model)
    states: Tensor = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    return states


def logits_of(model: Any, batch: Batch) -> Tensor:
    """A causal language model's logits for a batch of texts: [B, T, V]."""
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


@torch.no_grad()
def head_makes_logits(model: Any, batch: Batch) -> bool:
    """Whether a model's logits are what its head makes of the last states: not scaled, not capped."""
    head: Callable[[Tensor], Tensor] | None = model.get_output_embeddings()
    if head is None or base_of(model) is model:
        return False
    expected = logits_of(model, batch)
    found = head(last_states(model, batch))
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= SAME_LOGITS * expected.abs().max())


def quotient(total: float, weight: float) -> float:
    return total / weight if weight > 0 else 0.0
