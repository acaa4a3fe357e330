"""The healing loop: the original teaches the compressed model on unlabelled text, through accelerate."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.ffn.quantization import fake_quantize
from ffsplit.healing.losses import distance, outputs, quotient, total_distance, weight
from ffsplit.healing.settings import HealingSettings
from ffsplit.healing.team import Alone, Team
from ffsplit.models.family import Makes
from ffsplit.models.load import classifies

# The state of a healing run as one safetensors file, so that it can resume where it was stopped.


@dataclass
class HealingState:
    """How far a run is, and the best weights it has seen. Losses are validation distances."""

    step: int = 0
    first_loss: float = float("inf")
    best_loss: float = float("inf")
    best_step: int = 0
    num_worse: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, weights: dict[str, Tensor], optimizer: Any) -> None:
        """Write the state, the current weights and the optimizer's moments."""
        tensors = {f"weights.{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        facts = {"step": self.step, "best_step": self.best_step, "num_worse": self.num_worse}
        losses = {"first_loss": self.first_loss, "best_loss": self.best_loss}
        metadata = {"state": json.dumps(facts | losses)}
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: Path, weights: dict[str, Tensor], optimizer: Any) -> HealingState:
        """Read a state into the given weights, in place, and into the optimizer."""
        with safe_open(path, framework="pt") as file:
            state = cls(**json.loads(file.metadata()["state"]))
            moments: dict[int, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118
                group, _, name = key.partition(".")
                tensor = file.get_tensor(key)
                if group == "weights":
                    weights[name].data.copy_(tensor)
                elif group == "best":
                    state.best[name] = tensor
                else:
                    index, _, name = name.partition(".")
                    moments.setdefault(int(index), {})[name] = tensor
        loaded = optimizer.state_dict()
        loaded["state"] = moments
        optimizer.load_state_dict(loaded)
        return state


# One step's gradient, and the evaluation on validation rows, divided over a team.


@dataclass(frozen=True)
class Distillation:
    """A student, its teacher, the student's trained weights, and the team that works on it.

    All processes of the team call the same methods with the same arguments, and end with the same
    weights and the same figures.
    """

    student: Any
    teacher: Any
    weights: dict[str, Tensor]
    makes: Makes
    team: Team

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def meet(self, step: int) -> None:
        """Wait until all processes are at this step, so that none writes a state while another reads one."""
        steps = [torch.tensor([float(step)], dtype=torch.float64, device=self.device) for _ in self.team.mine]
        if float(self.team.sum(steps)) != self.team.size * step:
            raise RuntimeError(f"healing resumes from step {step} here and from another step elsewhere")

    def set_gradient(self, rows: Sequence[Sequence[int]], *, pad_id: int, accelerator: Any) -> None:
        """Set the weights' gradients to those of the rows' distance: the shares' sum, in their order.

        A share without rows computes the first row with weight zero, so that all shares have the same
        gradients to add.
        """
        shares = [rows[share :: self.team.size] for share in self.team.mine]
        batches = [_whole_batch(share or rows[:1], pad_id).to(self.device) for share in shares]
        with torch.no_grad():
            expected = [outputs(self.teacher, batch, makes=self.makes) for batch in batches]
        parts = [
            weight(target, batch, makes=self.makes) * bool(share)
            for share, batch, target in zip(shares, batches, expected, strict=True)
        ]
        whole = self.team.sum(parts)
        flat = []
        for batch, target, part in zip(batches, expected, parts, strict=True):
            with accelerator.autocast():
                found = outputs(self.student, batch, makes=self.makes)
                loss = distance(found, target, batch, makes=self.makes)
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
        """Evaluate the student, and keep its weights if they are the best so far."""
        sums = []
        for share in self.team.mine:
            mine = batches[share :: self.team.size]
            totals = total_distance(self.student, self.teacher, mine, makes=self.makes)
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


SORTED_BATCHES = 16
"""Rows are shuffled, then sorted by length within this many batches, to reduce padding."""


ENCODER_RATE = 2.0
"""The factor on the learning rate for an encoder."""
FAR, FAR_LOGITS = 0.15, 0.02
"""An encoder closer to its original than this is healed at a lower rate; for a classifier, by its logits."""


class FakeQuantize(nn.Module):
    """A weight as it will be once quantized, so that training takes the rounding into account.

    Scales are per row of [out, in]; per column if `transposed`.
    """

    def __init__(self, *, num_bits: int, group_size: int | None, transposed: bool) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"num_bits": num_bits, "group_size": group_size}
        self._transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        if self._transposed:
            return fake_quantize(weight.T, **self._options).T
        return fake_quantize(weight, **self._options)


@dataclass(frozen=True)
class HealingData:
    """Token ids of the training rows, and of the validation rows that decide when to stop."""

    rows: Sequence[Sequence[int]]
    validation: Sequence[Sequence[int]]
    pad_id: int
    batch_tokens: int


def heal(
    student: Any,
    teacher: Any,
    data: HealingData,
    *,
    makes: Makes,
    settings: HealingSettings,
    seed: int,
    resume: Callable[[dict[str, Tensor], Any], HealingState | None],
    checkpoint: Callable[[HealingState, dict[str, Tensor], Any], None],
    team: Team | None = None,
) -> HealingState:
    """Train `student` in place, leave it in its best state, and return the record of the training.

    `resume` reads an earlier state into the weights and the optimizer, or returns None; `checkpoint` is
    called every `checkpoint_steps` steps. The same arguments give the same bytes on one kind of
    processor, resumed or not; on a GPU, a causal language model's can differ in the last bits.
    Every process of a `team` calls this with the same arguments and ends with the same weights;
    `checkpoint` is called in all of them.
    """
    device = next(student.parameters()).device
    accelerator = fresh_accelerator(settings, device)
    weights = trainable_weights(student)
    optimizer = torch.optim.AdamW(list(weights.values()), betas=(0.9, 0.99), weight_decay=0.0)
    optimizer = accelerator.prepare(optimizer)
    state = resume(weights, optimizer)
    distillation = Distillation(student, teacher, weights, makes, team or Alone())
    distillation.meet(state.step if state else 0)
    batches = [batch.to(device) for batch in _validation(data)]
    if state is None:
        state = HealingState()
        distillation.judge(state, batches)
        state.first_loss = state.best_loss
    far = FAR_LOGITS if classifies(teacher) else FAR
    peak = peak_rate(settings, state.first_loss, makes=makes, far=far)
    num_steps = num_epochs(data.rows, settings) * steps_an_epoch(data.rows, settings)
    evaluate_every = max(1, num_steps // (settings.epochs * settings.evaluations))
    for step, rows in enumerate(_training(data, settings, seed=seed)):
        if step < state.step:
            continue
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(step, num_steps, warm_up=settings.warm_up)
        distillation.set_gradient(rows, pad_id=data.pad_id, accelerator=accelerator)
        accelerator.clip_grad_norm_(weights.values(), settings.max_gradient_norm)
        optimizer.step()
        state.step = step + 1
        if state.step % evaluate_every == 0 or state.step == num_steps:
            distillation.judge(state, batches)
            if state.num_worse >= settings.patience:
                break
        if state.step % settings.checkpoint_steps == 0:
            checkpoint(state, weights, optimizer)
    for name, tensor in state.best.items():
        weights[name].data.copy_(tensor)
    return state


def fresh_accelerator(settings: HealingSettings, device: torch.device) -> Any:
    """An accelerator with these settings, whatever this process healed before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # or it rejects another precision or device
    return Accelerator(mixed_precision=settings.mixed_precision, cpu=device.type == "cpu")


def rows_a_step(rows: Sequence[Sequence[int]], settings: HealingSettings) -> int:
    """Rows per step: as many as the settings allow for rows of this mean length."""
    mean_length = sum(map(len, rows)) / max(1, len(rows))
    return max(1, min(settings.batch_rows, int(settings.batch_tokens / max(1.0, mean_length))))


def steps_an_epoch(rows: Sequence[Sequence[int]], settings: HealingSettings) -> int:
    return math.ceil(len(rows) / rows_a_step(rows, settings))


def num_epochs(rows: Sequence[Sequence[int]], settings: HealingSettings) -> int:
    """The number of epochs in the settings, or more if `min_steps` requires it."""
    return max(settings.epochs, math.ceil(settings.min_steps / max(1, steps_an_epoch(rows, settings))))


def trainable_weights(student: Any) -> dict[str, Tensor]:
    """Every floating-point parameter but the embeddings, what is tied to them, and those that are frozen.

    Freezes the embeddings.
    """
    tables = [module for module in student.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}
    weights = {}
    for name, parameter in student.named_parameters():
        if id(parameter) in embeddings:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            weights[name] = parameter
    return weights


def fake_quantized(
    linears: Sequence[nn.Module], *, num_bits: int, group_size: int | None, transposed: bool = False
) -> None:
    """Make linear layers compute with the weights they will have once quantized.

    `transposed` ones have weights [in, out]: transformers' Conv1D.
    """
    for linear in linears:
        rounded = FakeQuantize(num_bits=num_bits, group_size=group_size, transposed=transposed)
        parametrize.register_parametrization(linear, "weight", rounded)


def settle(linears: Sequence[nn.Module]) -> None:
    """Undo `fake_quantized`; the weights stay on the grid."""
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def peak_rate(settings: HealingSettings, first_loss: float, *, makes: Makes, far: float = FAR) -> float:
    """The peak learning rate: that of the settings, or for an encoder twice that, less if it is close.

    Steps keep a model moving at a distance from its original that grows with their size. A model that
    starts closer than that would first move away, and might not return before training ends.
    """
    if makes != "states":
        return settings.learning_rate
    return settings.learning_rate * ENCODER_RATE * min(1.0, first_loss / far) ** 2


def schedule(step: int, num_steps: int, *, warm_up: float) -> float:
    """Linear warm-up over a share of the steps, then a half cosine to zero: a factor in [0, 1]."""
    rising = min(1.0, (step + 1) / max(1.0, warm_up * num_steps))
    return rising * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))


def _validation(data: HealingData) -> Iterator[Batch]:
    return padded_batches(data.validation, batch_tokens=data.batch_tokens, pad_id=data.pad_id)


def _training(data: HealingData, settings: HealingSettings, *, seed: int) -> Iterator[list[Sequence[int]]]:
    """The rows of every step of all epochs, in an order that depends on the seed and the epoch alone."""
    size = rows_a_step(data.rows, settings)
    for epoch in range(num_epochs(data.rows, settings)):
        generator = random.Random(f"{seed}/{epoch}")
        order = generator.sample(range(len(data.rows)), len(data.rows))
        for start in range(0, len(order), size * SORTED_BATCHES):
            chunk = sorted(order[start : start + size * SORTED_BATCHES], key=lambda row: len(data.rows[row]))
            groups = [chunk[first : first + size] for first in range(0, len(chunk), size)]
            for group in generator.sample(groups, len(groups)):
                yield [data.rows[row] for row in group]
