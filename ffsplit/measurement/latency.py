"""Forward latency of two models, timed in turn in one process so that drift hits both alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ffsplit.artifacts.manifest import Latency, LoadAverage, Spread
from ffsplit.machine import usable_cores
from ffsplit.measurement.examples import example_inputs, vocab_size_of

WARM_UP_RUNS = 3
FEWEST_PAIRS = 6
"""Fewer have no 99 % confidence interval."""
MOST_ROUNDS = 4
"""Where noise could decide a gate, this many times the usual pairs are timed at most."""
CONFIDENCE = 0.99
NUM_RESAMPLES = 4000

Shape = tuple[int, int]


@torch.inference_mode()
def paired_latency(
    original: Any,
    compressed: Any,
    *,
    shapes: Sequence[Shape],
    num_pairs: int,
    limits: Sequence[tuple[Shape | None, float]] = (),
) -> tuple[Latency, ...]:
    """p50 and p95 of forward passes of random inputs at each (rows, tokens a row).

    `num_pairs` of them; more where the speed-up is so near to one of its `limits` (each for one shape,
    or all) that noise could decide on which side it is.
    """
    with batches_allowed(original, compressed):
        return tuple(
            _at_shape(
                original,
                compressed,
                shape,
                num_pairs=num_pairs,
                limits=[limit for where, limit in limits if where in (None, shape)],
            )
            for shape in shapes
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


def _at_shape(
    original: Any, compressed: Any, shape: Shape, *, num_pairs: int, limits: Sequence[float]
) -> Latency:
    rows, tokens = shape
    vocab_size = min(map(vocab_size_of, (original, compressed)))
    inputs = example_inputs(original, num_rows=rows, num_tokens=tokens, vocab_size=vocab_size)

    def timed(count: int) -> NDArray[np.float64]:
        return paired_times(
            lambda: original(**inputs),
            lambda: compressed(**inputs),
            num_pairs=count,
            on_cuda=original.device.type == "cuda",
        )

    times = timed(num_pairs)
    more = max(num_pairs, FEWEST_PAIRS)
    for _ in range(MOST_ROUNDS - 1):
        if all(spread_of(times).decides(limit) for limit in limits):
            break
        times = np.concatenate([times, timed(more)])
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
        speedup=p50[0] / p50[1],
        spread=spread_of(times),
        num_pairs=len(times),
    )


def spread_of(times: NDArray[np.float64]) -> Spread:
    """How far the ratio of the medians of [pairs, 2] times can be trusted; the same for the same times.

    The interval is a bootstrap's: pairs are drawn again and again, so what slows both calls of a pair
    does not count. Source: Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    p10, p90 = (float(each) for each in np.percentile(times[:, 0] / times[:, 1], [10, 90]))
    if len(times) < FEWEST_PAIRS:
        return Spread(p10=p10, p90=p90, low=None, high=None)
    drawn = np.random.default_rng(0).integers(len(times), size=(NUM_RESAMPLES, len(times)))
    medians = np.median(times[drawn], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(each) for each in np.percentile(medians[:, 0] / medians[:, 1], [tail, 100 - tail]))
    return Spread(p10=p10, p90=p90, low=low, high=high)


def load_average() -> float | None:
    """Of the last minute, None where the system tells none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def load_since(before: float | None) -> LoadAverage | None:
    """The load before and now, beside the CPUs that this process may run on."""
    after = load_average()
    if before is None or after is None:
        return None
    return LoadAverage(before=round(before, 2), after=round(after, 2), num_cpus=usable_cores())


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
