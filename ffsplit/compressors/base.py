"""What a compressor is: one file, one frozen record of options, one function from weights to weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.ffn.weights import FFNWeights

CHUNK_TOKENS = 4096
"""Sampled inputs run in chunks of this many tokens, to bound the memory of a [T, N] matrix."""
FLOAT32_BYTES, FLOAT64_BYTES = 4, 8


class LayerWork(NamedTuple):
    """The size of one layer's work, to estimate its cost before anything is loaded.

    `kept_neurons` and `kept` are what the budget leaves: neurons, and the share of the FFN's elements.
    `num_tokens` is the number of sampled tokens.
    """

    shape: FFNShape
    kept_neurons: int
    kept: float
    num_tokens: int


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

    `inputs` are matrices [T, D] in float32, in shard order. `own_inputs` are those of the same tokens in a
    compressed model, if there is one: fits then use them too, and correct what earlier layers changed.
    """

    original: FFNWeights
    inputs: Sequence[Tensor]
    output_norm: OutputNorm | None = None
    own_inputs: Sequence[Tensor] | None = None

    def chunks(self) -> Iterator[Tensor]:
        """The sampled inputs, at most CHUNK_TOKENS rows at a time, always cut at the same places."""
        for shard_TD in self.inputs:
            yield from torch.split(shard_TD, CHUNK_TOKENS)

    @cached_property
    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The original's output for each chunk: [T, D]. Computed once; takes as much memory as the inputs."""
        return [self.original(x_TD) for x_TD in self.chunks()]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of inputs and the original's outputs."""
        return zip(self.chunks(), self.outputs, strict=True)

    def own_chunks(self) -> Iterator[Tensor]:
        """Like `chunks`, but the inputs that the compressed FFN sees for the same tokens."""
        for shard_TD in self.inputs if self.own_inputs is None else self.own_inputs:
            yield from torch.split(shard_TD, CHUNK_TOKENS)

    def examples(self) -> tuple[Tensor, Tensor]:
        """Inputs to fit an FFN to, and what it should pass on for them: [n, D] each.

        Own inputs, if any, come first and the original's after them: [2n, D], with the same targets for
        both. If every layer were fitted to its drifted inputs only, each would correct the same drift, and
        together they would overcorrect.
        """
        inputs_TD = torch.cat([*(self.own_inputs or ()), *self.inputs])
        with torch.no_grad():
            targets_TD = torch.cat([self.passed_on(x_TD, y_TD) for x_TD, y_TD in self.pairs()])
        return inputs_TD, targets_TD

    def passed_on(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """What the next layer sees for an FFN's output y: y itself, or norm(x + y) in some families."""
        return y_TD if self.output_norm is None else self.output_norm(x_TD + y_TD)


@torch.no_grad()
def relative_error(ffn: FFNWeights, context: LayerContext) -> float:
    """|z' - z| / |z| over the sampled inputs, Frobenius norms; z is what the FFN passes on."""
    sums: Tensor | float = 0.0
    for (x_TD, y_TD), own_TD in zip(context.pairs(), context.own_chunks(), strict=True):
        original_TD = context.passed_on(x_TD, y_TD)
        compressed_TD = context.passed_on(own_TD, ffn(own_TD))
        squares = (compressed_TD - original_TD).square(), original_TD.square()
        sums = sums + torch.stack([each.sum(dtype=torch.float64) for each in squares])
    error, total = sums.tolist() if isinstance(sums, Tensor) else (0.0, 0.0)  # waits for a GPU here only
    return float((error / total) ** 0.5) if total > 0 else 0.0


class Compressor(Protocol):
    """One way to make a split FFN smaller. It knows the size of its result, and its own cost."""

    @property
    def adds_down_bias(self) -> bool:
        """Whether the output gets a bias even if the architecture has none."""
        ...

    def plan(
        self, layout: LayerLayout, *, shape: FFNShape, budget: int, multiple: int | None = None
    ) -> LayerLayout | None:
        """The layout that `compress` will return, of at most `budget` elements; None if nothing fits.

        A rank or width that it chooses is rounded as `rounded_down` says for `multiple`.
        """
        ...

    def memory_bytes(self, work: LayerWork) -> int:
        """Peak memory in bytes, besides the weights and the sampled inputs and outputs."""
        ...

    def operations(self, work: LayerWork) -> float:
        """Approximate number of floating-point operations."""
        ...

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        """Compress to `layout` or something smaller. Leaves its arguments unchanged."""
        ...
