"""Drops the light neurons, and may refit the rest to compensate for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.compressors.base import FLOAT64_BYTES, LayerContext, LayerWork
from ffsplit.compressors.least_squares import add_moment_, mirrored, refit_bias, refit_down, ridged_root
from ffsplit.config import Record
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.ffn.weights import FFNWeights


class PruneCompressor(Record):
    """Drop the light part.

    With `order: optimal_brain`, the neurons to drop are chosen anew, one at a time: always the one that the
    others can compensate for best. Otherwise the plan's are dropped. `compensation: bias` adds the mean of
    the dropped output to the output bias. `least_squares` refits the down projection, and the bias if the
    architecture has one, to the original output; a ridge of `ridge` times the mean squared activation pulls
    towards the original weights.
    """

    kind: Literal["prune"] = "prune"
    order: Literal["score", "optimal_brain"] = "score"
    compensation: Literal["none", "bias", "least_squares"] = "none"
    ridge: float = Field(default=1e-3, ge=0)

    @property
    def adds_down_bias(self) -> bool:
        return self.compensation == "bias"

    @property
    def only_drops(self) -> bool:
        """Whether it needs no inputs, because it takes the plan's neurons and refits nothing."""
        return self.order == "score" and self.compensation == "none"

    def plan(
        self, layout: LayerLayout, *, shape: FFNShape, budget: int, multiple: int | None = None
    ) -> LayerLayout | None:
        """The layout without its light part; None if nothing would be left."""
        down_bias = layout.down_bias or self.adds_down_bias
        pruned = layout.model_copy(update={"light": None, "down_bias": down_bias})
        return pruned if pruned.heavy is not None and pruned.num_elements(shape) <= budget else None

    def memory_bytes(self, work: LayerWork) -> int:
        """The covariance of all neurons, its root and inverse; or the moments of the kept neurons."""
        num_neurons, hidden, kept = work.shape.num_neurons, work.shape.hidden_size, work.kept_neurons
        if self.order == "optimal_brain":
            return 3 * num_neurons * num_neurons * FLOAT64_BYTES
        return (2 * kept + 3 * hidden) * kept * FLOAT64_BYTES if self.compensation == "least_squares" else 0

    def operations(self, work: LayerWork) -> float:
        num_neurons, hidden, kept = work.shape.num_neurons, work.shape.hidden_size, work.kept_neurons
        if self.order == "optimal_brain":
            return 6.0 * num_neurons**3
        if self.compensation == "least_squares":
            return 2.0 * kept * (kept + hidden) * (2 * work.num_tokens + kept)
        return 0.0

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        if ffn.light is None or ffn.heavy is None:
            return ffn
        if self.order == "optimal_brain":
            kept = optimal_brain_neurons(context, count=len(ffn.heavy.neurons), ridge=self.ridge)
            ffn = context.original.split(kept)
        pruned = replace(ffn, light=None)
        if self.compensation == "bias":
            return refit_bias(pruned, context=context)
        if self.compensation == "least_squares":
            return refit_down(pruned, context=context, ridge=self.ridge)
        return pruned


def optimal_brain_neurons(context: LayerContext, *, count: int, ridge: float) -> Tensor:
    """The ascending indices of the `count` neurons that the structured optimal brain surgeon keeps.

    It removes one neuron at a time: the one with the smallest |W_n|^2 / [H^-1]_nn, where H is the (ridged)
    covariance of the activations. The others' columns W are then updated to compensate for its output.
    O(N^3) time and N^2 float64 memory. Source: Hassibi and Stork, 1993; for whole neurons, SlimGPT,
    arXiv:2412.18110.
    """
    part = context.original.heavy
    assert part is not None, "the original is dense"
    covariance, square_N = _covariance(context)
    num_neurons = len(covariance)
    inverse = torch.cholesky_inverse(ridged_root(covariance, ridge=ridge, noise=square_N))
    weight_DN = part.down.weight.double().clone()
    is_left = torch.ones(num_neurons, dtype=torch.bool, device=inverse.device)
    for _ in range(num_neurons - count):
        loss_N = weight_DN.square().sum(0) / inverse.diagonal()
        loss_N[~is_left] = torch.inf
        worst = int(loss_N.argmin())
        row = inverse[worst] / inverse[worst, worst]
        weight_DN -= torch.outer(weight_DN[:, worst], row)
        inverse -= torch.outer(inverse[:, worst].clone(), row)
        inverse[worst, worst] = 1.0
        is_left[worst] = False
    return is_left.nonzero().flatten().cpu()


def _covariance(context: LayerContext) -> tuple[Tensor, Tensor]:
    """The covariance [N, N] of the original's activations over the sampled inputs, and their mean square.

    Computed in float64. Subtracting the mean leaves the covariance with the rounding error of a mean square.
    """
    original = context.original
    assert original.heavy is not None
    num_neurons = len(original.heavy.neurons)
    weight = original.heavy.down.weight
    gram = weight.new_zeros(num_neurons, num_neurons, dtype=torch.float64)
    total = weight.new_zeros(num_neurons, dtype=torch.float64)
    num_tokens = 0
    for x_TD in context.chunks():
        a_TN = original.heavy.hidden(x_TD, original.activation)
        add_moment_(gram, a_TN)
        total += a_TN.sum(0, dtype=torch.float64)
        num_tokens += len(a_TN)
    mean, moment = total / max(1, num_tokens), mirrored(gram) / max(1, num_tokens)
    return moment - torch.outer(mean, mean), moment.diagonal()
