"""Forward latency of two models, timed in turn in one process so that drift hits both alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ffsplit.artifacts.manifest import Latency
from ffsplit.measurement.examples import example_inputs, vocab_size_of

WARM_UP_RUNS = 3


@torch.inference_mode()
def paired_latency(
    original: Any, compressed: Any, *, shapes: Sequence[tuple[int, int]], num_pairs: int
) -> tuple[Latency, ...]:
    """p50 and p95 over `num_pairs` forward passes of random inputs at each (rows, tokens a row)."""
    for model in (original, compressed):
        allow_batches(model)
    return tuple(
        _at_shape(original, compressed, rows, tokens, num_pairs=num_pairs) for rows, tokens in shapes
    )


def allow_batches(model: Any) -> None:
    """Let a classifier on a causal model, which looks for padding, run batches that have none."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = vocab_size_of(model)


def _at_shape(original: Any, compressed: Any, rows: int, tokens: int, *, num_pairs: int) -> Latency:
    vocab_size = min(map(vocab_size_of, (original, compressed)))
    inputs = example_inputs(original, num_rows=rows, num_tokens=tokens, vocab_size=vocab_size)
    for _ in range(WARM_UP_RUNS):
        _run_ms(original, inputs)
        _run_ms(compressed, inputs)
    times = np.empty((num_pairs, 2))
    for pair in range(num_pairs):
        turn = (0, 1) if pair % 2 == 0 else (1, 0)
        for which in turn:
            times[pair, which] = _run_ms((original, compressed)[which], inputs)
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


def _run_ms(model: Any, inputs: Mapping[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    model(**inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
