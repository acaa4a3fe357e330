"""One step's gradient, and the evaluation on validation rows, divided over a team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.healing.losses import Distance, quotient
from ffsplit.healing.team import Team

if TYPE_CHECKING:
    from ffsplit.healing.loop import HealingState
    from ffsplit.healing.rows import HealingData

MEMORY_SHARE = 0.7
"""Of a GPU's free memory, what the activations of one pass may take."""
MEASURED_TOKENS = 2048
"""Tokens of the pass whose memory is measured, in rows as long as the longest."""
MOMENTS = 2
"""Adam's, in the size of the weights. They are allocated by the first step."""


class Training(Protocol):
    """What healing asks of the processes that train one model. All call the same methods in step."""

    @property
    def device(self) -> torch.device: ...

    def meet(self, step: int) -> None:
        """Wait until all processes are at this step, so that none writes a state while another reads one."""
        ...

    def set_gradient(self, rows: Sequence[Sequence[int]], *, pad_id: int, accelerator: Any) -> None:
        """Set the weights' gradients to those of the rows' distance."""
        ...

    def clip(self, max_norm: float, *, accelerator: Any) -> None:
        """Scale the gradients down if their norm, over all processes, is larger."""
        ...

    def judge(self, state: HealingState, batches: Sequence[Batch]) -> None:
        """Evaluate the student, and keep its weights if they are the best so far."""
        ...

    def agree(self, is_due: bool) -> bool:
        """Whether to write a checkpoint: in processes that write one together, as the first one says."""
        ...

    def in_passes(self, data: HealingData, *, step_tokens: int, accelerator: Any) -> Training:
        """The same, with passes that fit into the device's memory."""
        ...


@dataclass(frozen=True)
class Distillation:
    """A student's distance from its teacher, the student's trained weights, and the team that works on it.

    All processes of the team call the same methods with the same arguments, and end with the same
    weights and the same figures. A share of a step that has more than `pass_tokens` tokens is computed in
    several passes, whose gradients are added.
    """

    distance: Distance
    weights: dict[str, Tensor]
    team: Team
    pass_tokens: int | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def meet(self, step: int) -> None:
        meet(self.team, step, device=self.device)

    def set_gradient(self, rows: Sequence[Sequence[int]], *, pad_id: int, accelerator: Any) -> None:
        """Set the weights' gradients to those of the rows' distance: the shares' sum, in their order.

        A share without rows computes the first row with weight zero, so that all shares have the same
        gradients to add.
        """
        shares = [rows[share :: self.team.size] for share in self.team.mine]
        passes = [self._passes(share or rows[:1], pad_id) for share in shares]
        with torch.no_grad():
            targets = [
                [self.distance.outputs(self.distance.teacher, batch) for batch in each] for each in passes
            ]
        counts = [float(bool(share)) for share in shares]
        weights = [
            torch.stack([*map(self.distance.weight, each)]).sum() * count
            for each, count in zip(targets, counts, strict=True)
        ]
        whole = self.team.sum(weights)
        flat = []
        for batches, expected, count in zip(passes, targets, counts, strict=True):
            for tensor in self.weights.values():
                tensor.grad = None
            for batch, target in zip(batches, expected, strict=True):
                self.distance.backward(batch, target, factor=count / whole, accelerator=accelerator)
            gradients = [tensor.grad for tensor in self.weights.values() if tensor.grad is not None]
            if self.team.size > 1:
                flat.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        if self.team.size > 1:
            summed = torch.split(self.team.sum(flat), [gradient.numel() for gradient in gradients])
            for gradient, total in zip(gradients, summed, strict=True):
                gradient.copy_(total.view_as(gradient))

    def _passes(self, rows: Sequence[Sequence[int]], pad_id: int) -> list[Batch]:
        tokens = self.pass_tokens or len(rows) * max(map(len, rows))
        return [batch.to(self.device) for batch in padded_batches(rows, batch_tokens=tokens, pad_id=pad_id)]

    def clip(self, max_norm: float, *, accelerator: Any) -> None:
        accelerator.clip_grad_norm_(self.weights.values(), max_norm)

    def agree(self, is_due: bool) -> bool:
        return is_due

    def judge(self, state: HealingState, batches: Sequence[Batch]) -> None:
        sums = []
        for share in self.team.mine:
            totals = self.distance.totals(batches[share :: self.team.size])
            sums.append(torch.tensor(totals, dtype=torch.float64, device=self.device))
        loss = quotient(*self.team.sum(sums).tolist())
        keep_best(state, loss, self.weights)

    def in_passes(self, data: HealingData, *, step_tokens: int, accelerator: Any) -> Distillation:
        tokens = tokens_a_pass(self, data, accelerator=accelerator)
        return replace(self, pass_tokens=tokens)


def meet(team: Team, step: int, *, device: torch.device) -> None:
    """Raise if another process of the team is at another step; return when all are here."""
    steps = [torch.tensor([float(step)], dtype=torch.float64, device=device) for _ in team.mine]
    if float(team.sum(steps)) != team.size * step:
        raise RuntimeError(f"healing resumes from step {step} here and from another step elsewhere")


def keep_best(
    state: HealingState, loss: float, weights: dict[str, Tensor], *, device: torch.device | None = None
) -> None:
    """Note a loss, and keep a copy of the weights if it is the best so far, on another `device` if given."""
    if loss < state.best_loss:
        state.best_loss, state.best_step, state.num_worse = loss, state.step, 0
        state.best = {name: tensor.detach().to(device=device, copy=True) for name, tensor in weights.items()}
    else:
        state.num_worse += 1


def tokens_a_pass(distillation: Distillation, data: HealingData, *, accelerator: Any) -> int | None:
    """How many tokens fit into a GPU's memory in one pass, a power of two; None on a CPU: all of them.

    The pass of a few rows is measured: what it takes beside the gradients is in proportion to its tokens.
    """
    if distillation.device.type != "cuda":
        return None
    longest = max(data.rows, key=len)
    rows = [longest] * max(1, MEASURED_TOKENS // len(longest)) * distillation.team.size
    measured = PassMemory.measured(
        distillation, distillation.weights, rows, pad_id=data.pad_id, accelerator=accelerator
    )
    tokens = measured.free / max(1, measured.taken) * len(rows) * len(longest) / distillation.team.size
    return power_of_two(tokens)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a GPU that a pass took beside the gradients, and what passes may take of those left."""

    taken: int
    free: float

    @classmethod
    def measured(
        cls,
        training: Training,
        weights: dict[str, Tensor],
        rows: Sequence[Sequence[int]],
        *,
        pad_id: int,
        accelerator: Any,
    ) -> PassMemory:
        """Compute the rows' gradient once, and drop it."""
        device = training.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        training.set_gradient(rows, pad_id=pad_id, accelerator=accelerator)
        gradients = [tensor.grad for tensor in weights.values() if tensor.grad is not None]
        held = sum(gradient.nbytes for gradient in gradients)
        taken = torch.cuda.max_memory_allocated(device) - before - held
        del gradients
        for tensor in weights.values():
            tensor.grad = None
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] - (1 + MOMENTS) * held
        return cls(taken, MEMORY_SHARE * free)


def power_of_two(tokens: float) -> int:
    """The largest power of two that is not more, at least 1."""
    return 1 << max(0, int(tokens).bit_length() - 1)
