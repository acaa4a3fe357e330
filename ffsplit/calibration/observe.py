"""A shard of batches through a model, watched: the whole model at once, or one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffsplit.calibration.batches import Batch
from ffsplit.calibration.hooks import FFNObserver
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.models.architectures import Architecture
from ffsplit.models.streamed import StreamedModel


class Observed(NamedTuple):
    """What was seen of one layer; either may be None where it was not asked for or not sampled."""

    statistics: NeuronStats | None
    input_TD: Tensor | None


@torch.no_grad()
def observe(
    model: Any, row: Architecture, batches: Sequence[Batch], *, sampled: Tensor, inputs_only: bool = False
) -> Iterator[Observed]:
    """Every layer in turn. `sampled` and `inputs_only` are FFNObserver's.

    A streamed model is brought through its blocks as the layers are asked for; the bytes are the same.
    """
    if isinstance(model, StreamedModel):
        yield from _block_by_block(model, row, batches, sampled=sampled, inputs_only=inputs_only)
        return
    with FFNObserver(model, row, sampled=sampled, inputs_only=inputs_only) as observer:
        for batch in batches:
            observer.next_batch(batch.attention_mask)
            if not inputs_only or observer.batch_is_sampled:
                model(**batch.to(model.device).arguments)
    yield from _layers(observer, inputs_only=inputs_only)


def _block_by_block(
    model: StreamedModel, row: Architecture, batches: Sequence[Batch], *, sampled: Tensor, inputs_only: bool
) -> Iterator[Observed]:
    model.start([batch.arguments for batch in batches])
    for layer in range(len(model.blocks)):
        with model.block(layer):
            observer = FFNObserver(
                model.base_model, row, sampled=sampled, inputs_only=inputs_only, layers=(layer,)
            )
            with observer:
                for index, batch in enumerate(batches):
                    observer.next_batch(batch.attention_mask)
                    if not inputs_only or observer.batch_is_sampled:
                        model.advance(index)
        yield from _layers(observer, inputs_only=inputs_only)


def _layers(observer: FFNObserver, *, inputs_only: bool) -> Iterator[Observed]:
    statistics, inputs = () if inputs_only else observer.statistics(), observer.inputs()
    for position in range(len(observer.layers)):
        stats = statistics[position] if statistics else None
        yield Observed(stats, inputs[position] if inputs else None)
