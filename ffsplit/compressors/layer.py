"""One layer, from the original's tensors and its plan to the compressed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ffsplit.compressors.base import Compressor, LayerContext
from ffsplit.compressors.weights import FFNWeights
from ffsplit.ffn import LayerLayout


class CompressedLayer(NamedTuple):
    """The compressed weights in float32, and |y' - y| / |y| over the sampled inputs."""

    weights: FFNWeights
    relative_error: float


@torch.no_grad()
def compress_layer(
    original: FFNWeights,
    *,
    heavy_neurons: Sequence[int],
    layout: LayerLayout,
    steps: Sequence[Compressor],
    inputs: Sequence[Tensor],
) -> CompressedLayer:
    """Split a dense FFN and run the steps over it. Pure: the same arguments give the same bytes."""
    context = LayerContext(original, inputs)
    ffn = original.split(torch.tensor(heavy_neurons, dtype=torch.long))
    for step in steps:
        ffn = step.compress(ffn, layout=layout, context=context)
    assert ffn.layout == layout, f"planned {layout}, got {ffn.layout}"
    return CompressedLayer(ffn, relative_error(ffn, context))


def relative_error(ffn: FFNWeights, context: LayerContext) -> float:
    """|y' - y| / |y| over the sampled inputs, Frobenius norms."""
    error = norm = 0.0
    for x_TD in context.chunks():
        y_TD = context.original(x_TD)
        error += float((ffn(x_TD) - y_TD).square().sum(dtype=torch.float64))
        norm += float(y_TD.square().sum(dtype=torch.float64))
    return float((error / norm) ** 0.5) if norm > 0 else 0.0
