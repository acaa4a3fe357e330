"""The healing loop: the original teaches the compressed model on unlabelled text, through accelerate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ffsplit import logs
from ffsplit.ffn.quantization import fake_quantize
from ffsplit.healing.gradient import Distillation, Training
from ffsplit.healing.losses import Distance
from ffsplit.healing.rows import HealingData, num_epochs, rows_by_step, steps_an_epoch
from ffsplit.healing.settings import STEP_TOKENS, HealingSettings
from ffsplit.healing.team import Alone, Team
from ffsplit.models.family import Makes
from ffsplit.models.load import classifies
from ffsplit.models.tensor_files import write_tensors
from ffsplit.store.beacon import Tell, tell_nobody

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
        write_tensors(path, tensors, metadata)

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


BETAS = {False: (0.9, 0.99), True: (0.9, 0.95)}
"""Adam's, of encoders and of causal language models (benchmarks/quality-tried.md)."""
ENCODER_RATE = 2.0
"""The factor on the learning rate for an encoder."""
WRITING_SHARE = 10
"""Healing takes this many times longer than to write its checkpoints, at least."""
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
    blocks: Sequence[str] | None = None,
    tell: Tell = tell_nobody,
) -> HealingState:
    """Train `student` in place, leave it in its best state, and return the record of the training.

    `resume` reads an earlier state into the weights and the optimizer, or returns None; `checkpoint` is
    called every `checkpoint_minutes` minutes, and `tell` after every step. The same arguments give the same
    bytes on one kind of processor, resumed or not; on a GPU, a causal language model's can differ in the last
    bits. Every process of a `team` calls this with the same arguments and ends with the same weights;
    `checkpoint` is called in all of them. If the models are divided among these processes, `blocks` are the
    paths of their blocks; weights, moments and states are then those of the process's part.
    """
    device = next(student.parameters()).device
    accelerator = fresh_accelerator(settings, device)
    weights = trainable_weights(student)
    distance = Distance.of(
        student,
        teacher,
        data.first_batch().to(device),
        makes=makes,
        text_share=settings.text_share,
        states_weight=settings.states_weight,
    )
    training, weights = _training(distance, weights, team=team, blocks=blocks, accelerator=accelerator)
    betas, on_gpu = BETAS[makes == "next_tokens"], device.type == "cuda"
    adam = torch.optim.AdamW(list(weights.values()), betas=betas, weight_decay=0.0, fused=on_gpu)
    optimizer = accelerator.prepare(adam)
    state = resume(weights, optimizer)
    batches = [batch.to(device) for batch in data.validation_batches()]
    training.meet(state.step if state else 0)
    if state is None:
        state = HealingState()
        training.judge(state, batches)
        state.first_loss = state.best_loss
    training = training.in_passes(data, step_tokens=settings.step_tokens, accelerator=accelerator)
    far = FAR_LOGITS if classifies(teacher) else FAR
    peak = peak_rate(settings, state.first_loss, makes=makes, far=far)
    num_steps = num_epochs(data.rows, settings) * steps_an_epoch(data.rows, settings)
    evaluate_every = max(1, num_steps // (settings.epochs * settings.evaluations))
    pace = Pace(num_steps, settings.checkpoint_minutes, tell)
    for step, rows in enumerate(rows_by_step(data.rows, settings, seed=seed)):
        if step < state.step:
            continue
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(step, num_steps, warm_up=settings.warm_up)
        training.set_gradient(rows, pad_id=data.pad_id, accelerator=accelerator)
        training.clip(settings.max_gradient_norm, accelerator=accelerator)
        optimizer.step()
        state.step = step + 1
        pace.count(rows, state.step)
        if state.step % evaluate_every == 0 or state.step == num_steps:
            training.judge(state, batches)
            pace.log(state)
            if state.num_worse >= settings.patience:
                break
        if training.agree(pace.is_checkpoint_due()):
            checkpoint(state, weights, optimizer)
            pace.wrote_checkpoint()
    for name, tensor in state.best.items():
        weights[name].data.copy_(tensor)
    return state


def _training(
    distance: Distance,
    weights: dict[str, Tensor],
    *,
    team: Team | None,
    blocks: Sequence[str] | None,
    accelerator: Any,
) -> tuple[Training, dict[str, Tensor]]:
    """What computes gradients, and the weights they are of: if models are divided, this process's part."""
    if blocks is None:
        return Distillation(distance, weights, team or Alone()), weights
    from ffsplit.healing.sharded import ShardedDistillation

    assert team is not None, "only processes of a team divide a model"
    divided = ShardedDistillation.of(distance, weights, team=team, accelerator=accelerator, blocks=blocks)
    return divided, divided.weights


class Pace:
    """How fast a run is, and when its next checkpoint is due."""

    def __init__(self, num_steps: int, checkpoint_minutes: float, tell: Tell = tell_nobody) -> None:
        self._num_steps, self._wait_s, self._tell = num_steps, 60 * checkpoint_minutes, tell
        self._started = self._saved = time.monotonic()
        self._num_tokens = 0

    def count(self, rows: Sequence[Sequence[int]], step: int) -> None:
        """Count a step's tokens, and tell how far the run is."""
        self._num_tokens += sum(map(len, rows))
        self._tell(step, self._num_steps, f"{self._tokens_per_s:,.0f} tokens/s")

    @property
    def _tokens_per_s(self) -> float:
        return self._num_tokens / max(1e-9, time.monotonic() - self._started)

    def is_checkpoint_due(self) -> bool:
        """Whether so many minutes are over since the last time that this was true, or since the start."""
        now = time.monotonic()
        if now - self._saved < self._wait_s:
            return False
        self._saved = now
        return True

    def wrote_checkpoint(self) -> None:
        """Wait longer for the next one if this took long to write."""
        now = time.monotonic()
        if self._wait_s:
            self._wait_s = max(self._wait_s, WRITING_SHARE * (now - self._saved))
            self._saved = now

    def log(self, state: HealingState) -> None:
        """Write a line about the state that was just evaluated."""
        logs.log(
            "healing",
            step=state.step,
            steps=self._num_steps,
            tokens_per_s=round(self._tokens_per_s),
            first_loss=round(state.first_loss, 5),
            best_loss=round(state.best_loss, 5),
        )


def fresh_accelerator(settings: HealingSettings, device: torch.device) -> Any:
    """An accelerator with these settings, whatever this process healed before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # or it rejects another precision or device
    return Accelerator(mixed_precision=settings.mixed_precision, cpu=device.type == "cpu")


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

    It is for steps of STEP_TOKENS tokens, and grows with the square root of their number. Steps keep a model
    moving at a distance from its original that grows with their size. A model that starts closer than that
    would first move away, and might not return before training ends.
    """
    rate = settings.learning_rate * math.sqrt(settings.step_tokens / STEP_TOKENS)
    if makes != "states":
        return rate
    return rate * ENCODER_RATE * min(1.0, first_loss / far) ** 2


def schedule(step: int, num_steps: int, *, warm_up: float) -> float:
    """Linear warm-up over a share of the steps, then a half cosine to zero: a factor in [0, 1]."""
    rising = min(1.0, (step + 1) / max(1.0, warm_up * num_steps))
    return rising * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
