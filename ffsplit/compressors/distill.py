"""Fits a narrower FFN to its own layer's original outputs, by gradient descent.

Each layer is fitted alone, so layers are independent: first on the inputs it saw in the original model, then
also on those it sees in the compressed one. The error is measured on what the next layer sees.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.compressors.base import FLOAT32_BYTES, LayerContext, LayerWork, relative_error
from ffsplit.compressors.least_squares import refit_down
from ffsplit.compressors.replayed import repeat
from ffsplit.config import Record
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, PartLayout, rounded_down
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap
from ffsplit.machine import multiplies_bfloat16

WARM_UP_STEPS = 20
WIDE = 1024
"""Above this many columns, a matrix's learning rate is inversely proportional to their number."""


class DistillCompressor(Record):
    """Fit `part` with Adam and a cosine schedule: `num_steps` batches of `batch_tokens` sampled inputs.

    `whole` fits everything that prune left of the FFN. `light` keeps the heavy hitters exact and replaces
    the light part by its strongest neurons, as many as the budget allows. These are refitted, and then
    fitted to stand in for the whole light part. A fit that does not lower the error is discarded. With
    `mixed_precision: bfloat16`, products are in bfloat16 and everything else in float32. A run decides
    `auto` once for all its hosts (`settled`); otherwise the step checks the processor or GPU it runs on.
    """

    kind: Literal["distill"] = "distill"
    part: Literal["whole", "light"] = "whole"
    num_steps: int = Field(default=600, ge=1)
    batch_tokens: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=8e-3, gt=0)
    ridge: float = Field(default=1e-3, ge=0)
    mixed_precision: Literal["auto", "bfloat16", "no"] = "auto"

    @property
    def adds_down_bias(self) -> bool:
        return False

    def settled(self, *, in_bfloat16: bool) -> DistillCompressor:
        """This step, with `auto` decided."""
        if self.mixed_precision != "auto":
            return self
        return self.model_copy(update={"mixed_precision": "bfloat16" if in_bfloat16 else "no"})

    def _in_bfloat16(self, device: str) -> bool:
        """Whether products are in bfloat16. Raises ConfigError if this host would give different bytes."""
        if self.mixed_precision == "no":
            return False
        able = multiplies_bfloat16(device)
        if self.mixed_precision == "bfloat16" and not able:
            what = "GPU" if device == "cuda" else "CPU"
            raise ConfigError(
                f"host {socket.gethostname()}: this run fits layers with bfloat16 products, but this "
                f"{what} has no instructions for them: give --dtype float32, or use hosts of one kind"
            )
        return able

    def plan(
        self, layout: LayerLayout, *, shape: FFNShape, budget: int, multiple: int | None = None
    ) -> LayerLayout | None:
        """The same layout; for `light`, with as many light neurons as the budget allows.

        It is the sum of both widths that is rounded, since a checkpoint stores both parts as one.
        """
        if self.part == "whole" or layout.light is None:
            fits = layout.num_elements(shape) <= budget
            return layout if fits and all(part.is_dense for part in layout.parts) else None
        without_light = layout.model_copy(update={"light": None}).num_elements(shape)
        cost, num_heavy = shape.elements_per_neuron, layout.num_neurons - layout.light.num_neurons
        width = min(layout.light.num_neurons, (budget - without_light) // cost)
        sum_of_both = rounded_down(num_heavy + width, multiple=multiple, cost=cost, whole=shape.num_elements)
        if sum_of_both > num_heavy or multiple is not None:
            width = sum_of_both - num_heavy
        if width < 1:
            return None
        return layout.model_copy(update={"light": PartLayout.dense(shape, width)})

    def memory_bytes(self, work: LayerWork) -> int:
        """Weights, gradients, Adam's two moments, and a copy of the inputs and targets."""
        trained = int(work.shape.num_elements * work.kept) * 4
        return FLOAT32_BYTES * (trained + 2 * work.num_tokens * work.shape.hidden_size)

    def operations(self, work: LayerWork) -> float:
        """Targets from the original, then per step a forward pass, and a backward pass at twice its cost."""
        num_tokens = self.num_steps * min(self.batch_tokens, work.num_tokens)
        return 2.0 * num_tokens * work.shape.num_elements * (1 + 3 * work.kept)

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        if sum(len(part.neurons) for part in ffn.parts) == len(context.original.parts[0].neurons):
            if self.part == "whole" or ffn.light is None or layout.light is None:
                return ffn
            if layout.light.num_neurons == len(ffn.light.neurons):
                return ffn
        if self.part == "light" and ffn.light is not None and layout.light is not None:
            ffn = self._narrowed(ffn, count=layout.light.num_neurons, context=context)
        fitted = self._fit(ffn, context)
        return fitted if relative_error(fitted, context) < relative_error(ffn, context) else ffn

    def _narrowed(self, ffn: FFNWeights, *, count: int, context: LayerContext) -> FFNWeights:
        """Keep the strongest light neurons only, and refit their down projection beside the heavy hitters."""
        assert ffn.light is not None
        strength_N = ffn.light.down.weight.new_zeros(len(ffn.light.neurons), dtype=torch.float64)
        for x_TD in context.chunks():
            hidden_TN = ffn.light.hidden(x_TD, ffn.activation)
            strength_N += hidden_TN.square().sum(0, dtype=torch.float64)
        strength_N *= ffn.light.down.weight.square().sum(0, dtype=torch.float64)
        light = ffn.light.select(strength_N.cpu().topk(count).indices.sort().values)
        swapped = replace(ffn, heavy=light, light=ffn.heavy)
        refitted = refit_down(swapped, context=context, ridge=self.ridge)
        return replace(refitted, heavy=refitted.light, light=refitted.heavy)

    @torch.enable_grad()
    def _fit(self, ffn: FFNWeights, context: LayerContext) -> FFNWeights:
        trainable = _trainable(ffn, only_light=self.part == "light")
        groups = [
            {"params": [tensor], "scale": rate_scale(tensor)}
            for tensor in _tensors(trainable)
            if tensor.requires_grad
        ]
        inputs_TD, targets_TD = context.examples()
        scale = 1.0 if context.output_norm is not None else targets_TD.square().mean()
        device = inputs_TD.device.type
        in_bfloat16 = self._in_bfloat16(device)

        def backward(rows: Tensor) -> None:
            x_TD = inputs_TD[rows]
            with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16):
                y_TD = trainable(x_TD)
            error_TD = context.passed_on(x_TD, y_TD.float()) - targets_TD[rows % len(targets_TD)]
            loss = error_TD.square().mean() / scale
            loss.backward()  # type: ignore[no-untyped-call]

        generator = torch.Generator().manual_seed(0)
        drawn = (
            torch.randint(len(inputs_TD), (self.batch_tokens,), generator=generator)
            for _ in range(self.num_steps)
        )
        rates = [self.learning_rate * schedule(step, self.num_steps) for step in range(self.num_steps)]
        train = _train_on_gpu if device == "cuda" else _train
        train(groups, drawn, rates, backward)
        return _detached(trainable)


BETAS = (0.9, 0.99)
Backward = Callable[[Tensor], None]
"""Adds the gradients of the loss at some rows of the inputs."""


def _train(
    groups: list[dict[str, Any]], drawn: Iterable[Tensor], rates: Sequence[float], backward: Backward
) -> None:
    """A step of Adam per batch of rows and rate. A group's rate is `scale` times that."""
    optimizer = torch.optim.Adam(groups, lr=rates[0], betas=BETAS)
    for rows, rate in zip(drawn, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        backward(rows)
        optimizer.step()


def _train_on_gpu(
    groups: list[dict[str, Any]], drawn: Iterable[Tensor], rates: Sequence[float], backward: Backward
) -> None:
    """The same steps as `_train`, with all rows and rates on the GPU, so that one graph replays them."""
    rows_SB = torch.stack(list(drawn)).cuda()
    rates_S = torch.tensor(rates, device="cuda")
    step = torch.zeros(1, dtype=torch.long, device="cuda")
    for group in groups:
        group["lr"] = torch.zeros((), device="cuda")
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True, capturable=True)

    def one() -> None:
        rate = rates_S.index_select(0, step).squeeze()
        for group in optimizer.param_groups:
            torch.mul(rate, group["scale"], out=group["lr"])
        optimizer.zero_grad()
        backward(rows_SB.index_select(0, step).flatten())
        optimizer.step()
        step.add_(1)

    repeat(one, times=len(rates))


def rate_scale(tensor: Tensor) -> float:
    """The factor on a tensor's learning rate: smaller for a matrix with many columns.

    A step of Adam changes each element by a similar amount, so it changes the product with an input in
    proportion to the number of columns. Source: muP, arXiv:2203.03466.
    """
    return min(1.0, WIDE / tensor.shape[1]) if tensor.dim() == 2 else 1.0


def schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then a half cosine to zero: a factor of the learning rate, in [0, 1]."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))


def _trainable(ffn: FFNWeights, *, only_light: bool) -> FFNWeights:
    """A copy whose tensors take gradients; with `only_light` the heavy hitters' do not."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().clone().requires_grad_()

    def linear(old: LinearMap) -> LinearMap:
        weight = leaf(old.weight)
        assert weight is not None
        return LinearMap.dense(weight, leaf(old.bias))

    def part(old: FFNPart) -> FFNPart:
        gate = None if old.gate is None else linear(old.gate)
        return FFNPart(old.neurons, linear(old.up), gate, linear(old.down))

    return FFNWeights(
        heavy=ffn.heavy if only_light or ffn.heavy is None else part(ffn.heavy),
        light=None if ffn.light is None else part(ffn.light),
        down_bias=leaf(ffn.down_bias),
        activation=ffn.activation,
    )


def _tensors(ffn: FFNWeights) -> list[Tensor]:
    linears = [linear for part in ffn.parts for linear in (part.up, part.gate, part.down)]
    tensors = [tensor for linear in linears if linear for tensor in (linear.weight, linear.bias)]
    return [tensor for tensor in (*tensors, ffn.down_bias) if tensor is not None]


def _detached(ffn: FFNWeights) -> FFNWeights:
    for tensor in _tensors(ffn):
        tensor.requires_grad_(False)
    return ffn
