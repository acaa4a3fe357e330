"""Compresses one layer: from the original's tensors and its plan to the compressed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ffsplit.compressors.base import Compressor, LayerContext, OutputNorm, relative_error
from ffsplit.compressors.distill import DistillCompressor
from ffsplit.ffn.shapes import LayerLayout, LowRank
from ffsplit.ffn.weights import FFNWeights


class CompressedLayer(NamedTuple):
    """The compressed weights in float32, and their relative error over the sampled inputs.

    None for an FFN that cannot be run on tokens: one with a convolution between its projections.
    """

    weights: FFNWeights
    relative_error: float | None


@torch.no_grad()
def compress_layer(
    original: FFNWeights,
    *,
    heavy_neurons: Sequence[int],
    layout: LayerLayout,
    steps: Sequence[Compressor],
    inputs: Sequence[Tensor],
    output_norm: OutputNorm | None = None,
) -> CompressedLayer:
    """Split a dense FFN and run the steps over it. Pure: the same arguments give the same bytes."""
    context = LayerContext(original, inputs, output_norm)
    ffn = original.split(torch.tensor(heavy_neurons, dtype=torch.long))
    for step in steps:
        ffn = step.compress(ffn, layout=layout, context=context)
    got = ffn.layout
    assert got == layout or _no_larger(got, layout), f"planned {layout}, got {got}"
    runs = not any(part.rows for part in ffn.parts)
    return CompressedLayer(ffn, relative_error(ffn, context) if runs else None)


@torch.no_grad()
def refit_layer(compressed: FFNWeights, step: DistillCompressor, *, context: LayerContext) -> CompressedLayer:
    """Refit a compressed FFN to the inputs it sees in the compressed model. Pure, like `compress_layer`."""
    fitted = step.compress(compressed, layout=compressed.layout, context=context)
    return CompressedLayer(fitted, relative_error(fitted, context))


def _no_larger(layout: LayerLayout, planned: LayerLayout) -> bool:
    """Whether two layouts differ only in ranks, none of which is above the planned one."""
    if len(layout.parts) != len(planned.parts) or layout.down_bias != planned.down_bias:
        return False
    for part, other in zip(layout.parts, planned.parts, strict=True):
        if part.num_neurons != other.num_neurons:
            return False
        for mine, theirs in ((part.up, other.up), (part.gate, other.gate), (part.down, other.down)):
            ranks = isinstance(mine, LowRank) and isinstance(theirs, LowRank) and mine.rank <= theirs.rank
            if mine != theirs and not ranks:
                return False
    return True
