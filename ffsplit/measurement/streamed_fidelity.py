"""Fidelity of a model that is too large to hold: both models go through their blocks side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.artifacts.manifest import BlockFidelity
from ffsplit.calibration.batches import Batch
from ffsplit.measurement.fidelity import fidelity
from ffsplit.models.rows import ModelKind
from ffsplit.models.streamed import StreamedModel


def streamed_fidelity(
    original: StreamedModel, compressed: StreamedModel, batches: Sequence[Batch], *, kind: ModelKind
) -> tuple[dict[str, float], tuple[BlockFidelity, ...]]:
    """What `fidelity` gives, and how far the hidden states have come apart after each block.

    One block is in memory at a time, of one model; what lies outside the blocks, of both.
    """
    assert batches, "there is nothing to compare on"
    for model in (original, compressed):
        model.start([batch.arguments for batch in batches])
    blocks = []
    for layer in range(len(original.blocks)):
        states = []
        for model in (original, compressed):
            with model.block(layer):
                states.append([hidden_of(model.advance(index)) for index in range(len(batches))])
        blocks.append(_compare(layer, states[0], states[1], batches))

    def recalled() -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            for model in (original, compressed):
                model.recall(index)
            yield batch.to(original.device)

    return fidelity(original.model, compressed.model, recalled(), kind=kind), tuple(blocks)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which may hold more."""
    states = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(states, Tensor)
    return states


def _compare(
    layer: int, original: Sequence[Tensor], compressed: Sequence[Tensor], batches: Sequence[Batch]
) -> BlockFidelity:
    """Over all tokens that are no padding: |h' - h| / |h|, and the mean cosine of h and h'."""
    error = total = cosine = 0.0
    num_tokens = 0
    for a_BTD, b_BTD, batch in zip(original, compressed, batches, strict=True):
        is_token = batch.attention_mask.bool()
        a_TD, b_TD = (states[is_token].float() for states in (a_BTD, b_BTD))
        error += float((b_TD - a_TD).square().sum(dtype=torch.float64))
        total += float(a_TD.square().sum(dtype=torch.float64))
        cosine += float(functional.cosine_similarity(a_TD, b_TD, dim=-1).sum(dtype=torch.float64))
        num_tokens += len(a_TD)
    relative = (error / total) ** 0.5 if total > 0 else 0.0
    return BlockFidelity(layer=layer, relative_error=relative, cosine=cosine / num_tokens)
