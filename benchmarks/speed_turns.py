"""Candidates that take turns, so that what else a machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP_ROUNDS, FEWEST_ROUNDS = 1, 3
SECONDS = 80
"""After which no round begins, once there have been enough."""


@torch.inference_mode()
def in_turn(calls: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, each round beginning with another one."""
    names, begin = list(calls), time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds + WARM_UP_ROUNDS):
        enough = number >= FEWEST_ROUNDS + WARM_UP_ROUNDS
        if enough and time.perf_counter() - begin > SECONDS:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= WARM_UP_ROUNDS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """How many times faster the second is: the ratio of the medians that are shown."""
    return statistics.median(times[first]) / statistics.median(times[second])
