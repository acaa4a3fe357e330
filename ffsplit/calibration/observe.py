"""A shard of batches through a model, watched: the whole model at once, or one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffsplit.calibration.batches import Batch
from ffsplit.calibration.hooks import FFNObserver, Sampling
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.models.places import FFNPlace
from ffsplit.models.streamed import StreamedModel


class Observed(NamedTuple):
    """What was seen of one FFN; either may be None where it was not asked for or not sampled.

    `inputs` are as the observer gives them: of experts they come with the first.
    """

    statistics: NeuronStats | None
    inputs: Mapping[str, Tensor] | None


@torch.no_grad()
def observe(
    model: Any,
    ffns: Sequence[FFNPlace],
    batches: Sequence[Batch],
    *,
    sampling: Sampling,
    inputs_only: bool = False,
) -> Iterator[Observed]:
    """Every FFN in turn. `sampling` and `inputs_only` are FFNObserver's.

    A streamed model is brought through its blocks as the FFNs are asked for; the bytes are the same.
    """
    if isinstance(model, StreamedModel):
        yield from _block_by_block(model, ffns, batches, sampling=sampling, inputs_only=inputs_only)
        return
    with FFNObserver(model, ffns, sampling=sampling, inputs_only=inputs_only) as observer:
        for batch in batches:
            observer.next_batch(batch.arguments)
            if not inputs_only or observer.batch_is_sampled:
                model(**batch.to(model.device, dtype=model.dtype).arguments)
    yield from _observed(observer, ffns, inputs_only=inputs_only)


def _block_by_block(
    model: StreamedModel,
    ffns: Sequence[FFNPlace],
    batches: Sequence[Batch],
    *,
    sampling: Sampling,
    inputs_only: bool,
) -> Iterator[Observed]:
    model.start([batch.arguments for batch in batches])
    for index, path in enumerate(model.block_paths):
        inside = [ffn for ffn in ffns if ffn.block == path]
        with model.block(index):
            observer = FFNObserver(model.base_model, inside, sampling=sampling, inputs_only=inputs_only)
            with observer:
                for number, batch in enumerate(batches):
                    observer.next_batch(batch.arguments)
                    if not inputs_only or observer.batch_is_sampled:
                        model.advance(number)
        yield from _observed(observer, inside, inputs_only=inputs_only)


def _observed(observer: FFNObserver, ffns: Sequence[FFNPlace], *, inputs_only: bool) -> Iterator[Observed]:
    statistics, inputs = None if inputs_only else observer.statistics(), observer.inputs()
    for position, ffn in enumerate(ffns):
        yield Observed(statistics[position] if statistics else None, inputs.get(ffn.index))
