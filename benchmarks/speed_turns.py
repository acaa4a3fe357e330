"""Candidates that take turns, so that what else a machine does meets all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP_ROUNDS, FEWEST_ROUNDS = 1, 3
SECONDS = 120
"""After which no round begins, once there have been enough."""
PAUSE_S = 0.02
"""Between candidates: threads of some engines keep a core busy for a while after their last product."""


@torch.inference_mode()
def in_turn(calls: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, each round in another order.

    Timed is the second of two calls, whose threads are awake and whose weights are in the caches, as on a
    server that has nothing else to do.
    """
    names, begin, generator = list(calls), time.perf_counter(), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds + WARM_UP_ROUNDS):
        enough = number >= FEWEST_ROUNDS + WARM_UP_ROUNDS
        if enough and time.perf_counter() - begin > SECONDS:
            break
        for name in generator.sample(names, len(names)):
            time.sleep(PAUSE_S)
            _run(calls[name])
            start = time.perf_counter()
            _run(calls[name])
            if number >= WARM_UP_ROUNDS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _run(function: Callable[[], Any]) -> None:
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """How many times faster the second is: the ratio of the medians that are shown."""
    return statistics.median(times[first]) / statistics.median(times[second])
