"""Statistics merge: counts exactly, sums to 1e-12, and along a tree that only their number decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffsplit.calibration.statistics import NeuronStats, merge_layers, reduce_tree
from ffsplit.errors import CalibrationError
from tests.calibration.random_statistics import assert_identical, random_statistics

SUMS = ("sum_abs", "sum", "sum_squares")


@settings(deadline=None)
@given(order=st.permutations(range(10)), size=st.integers(1, 10))
def test_merging_in_any_order_gives_exact_counts_and_sums_to_1e_12(order: list[int], size: int) -> None:
    shards = [random_statistics(seed) for seed in range(10)]
    merged = reduce(NeuronStats.merge, (shards[index] for index in order[:size]))
    chosen = [shards[index] for index in sorted(order[:size])]
    assert merged.num_tokens == sum(shard.num_tokens for shard in chosen)
    assert merged.num_active.tolist() == sum(shard.num_active for shard in chosen).tolist()
    assert merged.max_abs.tolist() == np.max([shard.max_abs for shard in chosen], axis=0).tolist()
    for name in SUMS:
        for neuron in range(merged.num_neurons):
            exact = sum(Fraction(float(getattr(shard, name)[neuron])) for shard in chosen)
            scale = sum(abs(Fraction(float(getattr(shard, name)[neuron]))) for shard in chosen)
            assert abs(Fraction(float(getattr(merged, name)[neuron])) - exact) <= scale * Fraction(1, 10**12)


def test_a_tree_of_any_order_agrees_with_a_chain_to_1e_12() -> None:
    shards = [random_statistics(seed) for seed in range(33)]
    tree, chain = reduce_tree(shards, NeuronStats.merge), reduce(NeuronStats.merge, reversed(shards))
    assert tree.num_active.tolist() == chain.num_active.tolist()
    np.testing.assert_allclose(tree.sum_abs, chain.sum_abs, rtol=1e-12)
    np.testing.assert_allclose(tree.sum_squares, chain.sum_squares, rtol=1e-12)
    assert_identical(tree, reduce_tree(iter(shards), NeuronStats.merge))


def test_merging_leaves_both_as_they_were() -> None:
    first, second = random_statistics(1), random_statistics(2)
    first.merge(second)
    assert_identical(first, random_statistics(1))
    assert_identical(second, random_statistics(2))


def test_statistics_of_different_weights_are_not_merged() -> None:
    with pytest.raises(CalibrationError, match="different weights"):
        random_statistics(1).merge(random_statistics(2, weights_seed=5))
    with pytest.raises(CalibrationError, match="different weights"):
        random_statistics(1).merge(random_statistics(2, num_neurons=7))


def test_layers_are_merged_each_with_its_own() -> None:
    first = (random_statistics(1, weights_seed=1), random_statistics(2, weights_seed=2))
    second = (random_statistics(3, weights_seed=1), random_statistics(4, weights_seed=2))
    for merged, one, other in zip(merge_layers(first, second), first, second, strict=True):
        assert_identical(merged, one.merge(other))


class Recorder:
    """Merges names into the shape of the tree, and counts what is held at a time."""

    def __init__(self, num_items: int) -> None:
        self.num_items, self.held, self.most_held = num_items, 0, 0

    def items(self) -> Iterator[str]:
        for index in range(self.num_items):
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            yield str(index)

    def merge(self, first: str, second: str) -> str:
        self.held -= 1
        return f"({first} {second})"


@pytest.mark.parametrize("num_items", range(1, 34))
def test_the_tree_merges_neighbours_and_holds_few_at_a_time(num_items: int) -> None:
    recorder = Recorder(num_items)
    tree = reduce_tree(recorder.items(), recorder.merge)
    leaves = tree.replace("(", "").replace(")", "").split()
    assert leaves == [str(index) for index in range(num_items)]
    assert tree.count("(") == num_items - 1
    assert recorder.most_held <= math.floor(math.log2(num_items)) + 1
    depth = max(tree[:end].count("(") - tree[:end].count(")") for end in range(len(tree) + 1))
    assert depth == math.ceil(math.log2(num_items))
    again = Recorder(num_items)
    assert reduce_tree(again.items(), again.merge) == tree


def test_the_tree_of_seven() -> None:
    recorder = Recorder(7)
    assert reduce_tree(recorder.items(), recorder.merge) == "(((0 1) (2 3)) ((4 5) 6))"


def test_nothing_to_reduce_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no statistics"):
        reduce_tree([], NeuronStats.merge)
