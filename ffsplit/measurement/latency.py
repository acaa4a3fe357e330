"""Forward latency of two models, timed in turn in one process so that drift hits both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ffsplit.artifacts.manifest import Latency
from ffsplit.measurement.examples import example_inputs, vocab_size_of

WARM_UP_RUNS = 3


@torch.inference_mode()
def paired_latency(
    original: Any, compressed: Any, *, shapes: Sequence[tuple[int, int]], num_pairs: int
) -> tuple[Latency, ...]:
    """p50 and p95 over `num_pairs` forward passes of random inputs at each (rows, tokens a row)."""
    with batches_allowed(original, compressed):
        return tuple(
            _at_shape(original, compressed, rows, tokens, num_pairs=num_pairs) for rows, tokens in shapes
        )


@contextmanager
def batches_allowed(*models: Any) -> Iterator[None]:
    """Let classifiers on causal models, which look for padding, run batches that have none meanwhile."""
    without = [model for model in models if getattr(model.config, "pad_token_id", None) is None]
    for model in without:
        model.config.pad_token_id = vocab_size_of(model)
    try:
        yield
    finally:
        for model in without:
            model.config.pad_token_id = None


def _at_shape(original: Any, compressed: Any, rows: int, tokens: int, *, num_pairs: int) -> Latency:
    vocab_size = min(map(vocab_size_of, (original, compressed)))
    inputs = example_inputs(original, num_rows=rows, num_tokens=tokens, vocab_size=vocab_size)
    times = paired_times(
        lambda: original(**inputs),
        lambda: compressed(**inputs),
        num_pairs=num_pairs,
        on_cuda=original.device.type == "cuda",
    )
    p50, p95 = np.percentile(times, 50, axis=0), np.percentile(times, 95, axis=0)
    return Latency(
        batch_size=rows,
        num_tokens=tokens,
        original_p50_ms=p50[0],
        original_p95_ms=p95[0],
        compressed_p50_ms=p50[1],
        compressed_p95_ms=p95[1],
        original_tokens_per_s=rows * tokens / p50[0] * 1e3,
        compressed_tokens_per_s=rows * tokens / p50[1] * 1e3,
        speedup=float(np.median(times[:, 0] / times[:, 1])),
        num_pairs=num_pairs,
    )


def paired_times(
    first: Callable[[], Any], second: Callable[[], Any], *, num_pairs: int, on_cuda: bool
) -> NDArray[np.float64]:
    """Milliseconds of two calls, made in turn after a warm-up: [num_pairs, 2]."""
    for _ in range(WARM_UP_RUNS):
        run_ms(first, on_cuda=on_cuda)
        run_ms(second, on_cuda=on_cuda)
    times = np.empty((num_pairs, 2))
    for pair in range(num_pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[pair, which] = run_ms((first, second)[which], on_cuda=on_cuda)
    return times


def run_ms(call: Callable[[], Any], *, on_cuda: bool) -> float:
    """How long a call takes, with what it leaves to the GPU: milliseconds."""
    start = time.perf_counter()
    call()
    if on_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
