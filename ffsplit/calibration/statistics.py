"""Statistics of each neuron: sums and counts over tokens, which can be merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ffsplit.errors import CalibrationError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class NeuronStats:
    """Statistics of the N neurons of one FFN, over `num_tokens` tokens that are not padding.

    a_n is a neuron's activation, the input of the down projection. `num_active` counts tokens with
    a_n > 0. `down_norm` is |W_down[:, n]|, the same in every shard.
    """

    num_tokens: int
    sum_abs: Floats
    sum: Floats
    sum_squares: Floats
    max_abs: Floats
    num_active: Ints
    down_norm: Floats
    expert: int | None = None
    """Which of its block's experts it is; None for an FFN that sees every token."""
    sum_weighted_norm: float | None = None
    """Of an expert: the sum over its tokens of the router's weight times the L2 norm of its output."""

    @property
    def num_neurons(self) -> int:
        return len(self.sum)

    def merge(self, other: NeuronStats) -> NeuronStats:
        """The statistics over the tokens of both. Raises CalibrationError when the models differ."""
        if not np.array_equal(self.down_norm, other.down_norm):
            raise CalibrationError("statistics of different weights cannot be merged")
        return NeuronStats(
            num_tokens=self.num_tokens + other.num_tokens,
            sum_abs=self.sum_abs + other.sum_abs,
            sum=self.sum + other.sum,
            sum_squares=self.sum_squares + other.sum_squares,
            max_abs=np.maximum(self.max_abs, other.max_abs),
            num_active=self.num_active + other.num_active,
            down_norm=self.down_norm,
            expert=self.expert,
            sum_weighted_norm=_sum(self.sum_weighted_norm, other.sum_weighted_norm),
        )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def experts_together(statistics: Sequence[NeuronStats]) -> list[list[int]]:
    """The indices of the FFNs in lists: one per FFN, and one for all experts of a block."""
    groups: list[list[int]] = []
    for index, stats in enumerate(statistics):
        if stats.expert:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def merge_layers(a: tuple[NeuronStats, ...], b: tuple[NeuronStats, ...]) -> tuple[NeuronStats, ...]:
    """Merge the statistics of two shards, layer by layer."""
    return tuple(first.merge(second) for first, second in zip(a, b, strict=True))


def reduce_tree(items: Iterable[T], merge: Callable[[T, T], T]) -> T:
    """Merge items along a tree fixed by their number, holding at most log2 of that number at a time.

    Works like a binary counter: two results of 2^k items each are merged as soon as both exist,
    so floating-point sums do not depend on who computed an item, or when.
    """
    pending: list[tuple[int, T]] = []
    for item in items:
        level, result = 0, item
        while pending and pending[-1][0] == level:
            result = merge(pending.pop()[1], result)
            level += 1
        pending.append((level, result))
    if not pending:
        raise CalibrationError("there are no statistics to reduce")
    _, result = pending.pop()
    while pending:
        result = merge(pending.pop()[1], result)
    return result
