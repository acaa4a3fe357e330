"""What a compressor is: one file, one frozen record of options, one function from weights to weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ffsplit.compressors.weights import FFNWeights
from ffsplit.ffn import FFNShape, LayerLayout

CHUNK_TOKENS = 4096
"""Sampled inputs are run in chunks of this many tokens, which bounds the memory of a [T, N] matrix."""


@dataclass(frozen=True)
class LayerContext:
    """What a compressor may look at: the original FFN and a sample of the inputs it saw.

    `inputs` are matrices [T, D] in float32, in shard order.
    """

    original: FFNWeights
    inputs: Sequence[Tensor]

    def chunks(self) -> Iterator[Tensor]:
        """The sampled inputs, at most CHUNK_TOKENS rows at a time, always cut at the same places."""
        for shard_TD in self.inputs:
            yield from torch.split(shard_TD, CHUNK_TOKENS)


class Compressor(Protocol):
    """One way to make a split FFN smaller."""

    def plan(self, layout: LayerLayout, *, shape: FFNShape, budget: int) -> LayerLayout | None:
        """The layout that `compress` will give, of at most `budget` elements; None where it cannot."""
        ...

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        """Compress to exactly `layout`, as `plan` gave it. Its argument is left as it was."""
        ...
