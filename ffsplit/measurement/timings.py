"""Two models over a grid of batch sizes and lengths, in turn; a causal model's prefill and decode apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ffsplit.artifacts.benchmarks import Figures, Timing
from ffsplit.measurement.examples import vocab_size_of
from ffsplit.measurement.latency import batches_allowed, paired_times, spread_of
from ffsplit.measurement.work import FEW_TOKENS, work_of
from ffsplit.models.load import decodes

Phase = Literal["forward", "prefill", "decode"]


@torch.inference_mode()
def time_models(
    original: Any, compressed: Any, *, shapes: Sequence[tuple[int, int]], num_pairs: int, new_tokens: int
) -> tuple[Timing, ...]:
    """Timings at each (rows, tokens a row); causal language models also decode `new_tokens` tokens."""
    with batches_allowed(original, compressed):
        return tuple(_timings((original, compressed), shapes, num_pairs=num_pairs, new_tokens=new_tokens))


def _timings(
    models: tuple[Any, Any], shapes: Sequence[tuple[int, int]], *, num_pairs: int, new_tokens: int
) -> Iterator[Timing]:
    in_phases = new_tokens > 0 and decodes(models[0])
    vocab_size = min(map(vocab_size_of, models))
    for rows, tokens in shapes:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (rows, tokens), generator=generator).to(models[0].device)
        mask = torch.ones_like(ids)
        calls = [_forward(model, ids, mask) for model in models]
        times = paired_times(*calls, num_pairs=num_pairs, on_cuda=ids.is_cuda)
        phase: Phase = "prefill" if in_phases else "forward"
        yield _timing(phase, times, models, rows=rows, tokens=tokens, tokens_a_call=rows * tokens)
        if in_phases:
            steps = [_decoder(model, ids) for model in models]
            times = paired_times(*steps, num_pairs=new_tokens, on_cuda=ids.is_cuda)
            yield _timing("decode", times, models, rows=rows, tokens=tokens, tokens_a_call=rows)


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids, attention_mask=mask)


def _decoder(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Each call reads one more token, after what the cache holds; which token is all the same here."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    token = ids[:, -1:]
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)


def _timing(
    phase: Phase, times: NDArray[np.float64], models: Any, *, rows: int, tokens: int, tokens_a_call: int
) -> Timing:
    before, after = (work_of(model) for model in models)
    by_bytes = tokens_a_call < FEW_TOKENS
    which = 1 if by_bytes else 0
    limit = before[which] / max(after[which], 1)
    original, compressed = (_figures(times[:, model], tokens_a_call) for model in (0, 1))
    speedup = original.p50_ms / compressed.p50_ms
    return Timing(
        phase=phase,
        batch_size=rows,
        num_tokens=tokens,
        original=original,
        compressed=compressed,
        speedup=speedup,
        spread=spread_of(times),
        limit=limit,
        limited_by="bytes" if by_bytes else "multiplications",
        share_of_limit=speedup / limit,
        num_pairs=len(times),
    )


def _figures(times_ms: NDArray[np.float64], tokens_a_call: int) -> Figures:
    p50, p95, p99 = (float(np.percentile(times_ms, percent)) for percent in (50, 95, 99))
    return Figures(p50_ms=p50, p95_ms=p95, p99_ms=p99, tokens_per_s=tokens_a_call / p50 * 1e3)
