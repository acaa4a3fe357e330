"""One step's gradient, and the judgement of validation rows, shared out over a team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffsplit.calibration.batches import Batch, padded_batches
from ffsplit.healing.losses import distance, outputs, quotient, total_distance, weight
from ffsplit.healing.state import HealingState
from ffsplit.healing.team import Team
from ffsplit.models.rows import ModelKind


@dataclass(frozen=True)
class Distillation:
    """A student, the weights of it that are trained, its teacher, and who works on it.

    All processes of the team call the same methods with the same arguments, and end with the same
    weights and the same figures.
    """

    student: Any
    teacher: Any
    weights: dict[str, Tensor]
    kind: ModelKind
    team: Team

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def meet(self, step: int) -> None:
        """Go on only when all are at this step: nobody writes a state while another still reads one."""
        steps = [torch.tensor([float(step)], dtype=torch.float64, device=self.device) for _ in self.team.mine]
        if float(self.team.sum(steps)) != self.team.size * step:
            raise RuntimeError(f"healing goes on from step {step} here and from another elsewhere")

    def set_gradient(self, rows: Sequence[Sequence[int]], *, pad_id: int, accelerator: Any) -> None:
        """Leave the gradient of the rows' distance in the weights: the shares' gradients, in their order.

        A share without a row works on the first one, which then counts for nothing, so that all shares
        have the same gradients to add.
        """
        shares = [rows[share :: self.team.size] for share in self.team.mine]
        batches = [_whole_batch(share or rows[:1], pad_id).to(self.device) for share in shares]
        with torch.no_grad():
            expected = [outputs(self.teacher, batch, kind=self.kind) for batch in batches]
        parts = [
            weight(target, batch, kind=self.kind) * bool(share)
            for share, batch, target in zip(shares, batches, expected, strict=True)
        ]
        whole = self.team.sum(parts)
        flat = []
        for batch, target, part in zip(batches, expected, parts, strict=True):
            with accelerator.autocast():
                found = outputs(self.student, batch, kind=self.kind)
                loss = distance(found, target, batch, kind=self.kind)
            for tensor in self.weights.values():
                tensor.grad = None
            accelerator.backward(loss * (part / whole))
            gradients = [tensor.grad for tensor in self.weights.values() if tensor.grad is not None]
            if self.team.size > 1:
                flat.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        if self.team.size > 1:
            summed = torch.split(self.team.sum(flat), [gradient.numel() for gradient in gradients])
            for gradient, total in zip(gradients, summed, strict=True):
                gradient.copy_(total.view_as(gradient))

    def judge(self, state: HealingState, batches: Sequence[Batch]) -> None:
        """Measure the student, and remember its weights when they are the best so far."""
        sums = []
        for share in self.team.mine:
            mine = batches[share :: self.team.size]
            totals = total_distance(self.student, self.teacher, mine, kind=self.kind)
            sums.append(torch.tensor(totals, dtype=torch.float64, device=self.device))
        loss = quotient(*self.team.sum(sums).tolist())
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.num_worse = loss, state.step, 0
            state.best = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        else:
            state.num_worse += 1


def _whole_batch(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """All rows in one batch."""
    (batch,) = padded_batches(rows, batch_tokens=len(rows) * max(map(len, rows)), pad_id=pad_id)
    return batch
