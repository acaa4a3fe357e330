"""What a compressor is: one file, one frozen record of options, one function from weights to weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.compressors.weights import FFNWeights
from ffsplit.ffn import FFNShape, LayerLayout

CHUNK_TOKENS = 4096
"""Sampled inputs are run in chunks of this many tokens, which bounds the memory of a [T, N] matrix."""


@dataclass(frozen=True)
class OutputNorm:
    """The layer norm of x + FFN(x), in families that normalise there: weight and bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        return functional.layer_norm(x_TD, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class LayerContext:
    """What a compressor may look at: the original FFN and a sample of the inputs it saw.

    `inputs` are matrices [T, D] in float32, in shard order.
    """

    original: FFNWeights
    inputs: Sequence[Tensor]
    output_norm: OutputNorm | None = None

    def chunks(self) -> Iterator[Tensor]:
        """The sampled inputs, at most CHUNK_TOKENS rows at a time, always cut at the same places."""
        for shard_TD in self.inputs:
            yield from torch.split(shard_TD, CHUNK_TOKENS)


def second_moment(inputs: Iterable[Tensor]) -> Tensor:
    """Sum over matrices [T, n] of x^T x: [n, n] in float64. There must be at least one."""
    total: Tensor | float = 0.0
    for x_TN in inputs:
        total = total + (x_TN.T @ x_TN).double()
    assert isinstance(total, Tensor), "there are no inputs"
    return total


@torch.no_grad()
def relative_error(ffn: FFNWeights, context: LayerContext) -> float:
    """|z' - z| / |z| over the sampled inputs, Frobenius norms.

    z is what the next layer sees of the FFN: its output y, or norm(x + y) in families that normalise
    there.
    """
    norm = context.output_norm
    error = total = 0.0
    for x_TD in context.chunks():
        original_TD, compressed_TD = context.original(x_TD), ffn(x_TD)
        if norm is not None:
            original_TD, compressed_TD = norm(x_TD + original_TD), norm(x_TD + compressed_TD)
        error += float((compressed_TD - original_TD).square().sum(dtype=torch.float64))
        total += float(original_TD.square().sum(dtype=torch.float64))
    return float((error / total) ** 0.5) if total > 0 else 0.0


class Compressor(Protocol):
    """One way to make a split FFN smaller."""

    @property
    def adds_down_bias(self) -> bool:
        """Whether the output gets a bias even where the architecture has none."""
        ...

    def plan(self, layout: LayerLayout, *, shape: FFNShape, budget: int) -> LayerLayout | None:
        """The layout that `compress` will give, of at most `budget` elements; None where it cannot."""
        ...

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        """Compress to `layout` or something smaller. The argument is left as it was."""
        ...
