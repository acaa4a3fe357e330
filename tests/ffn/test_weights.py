"""A split without compression is the same function as the dense FFN."""

from __future__ import annotations

import pytest
import torch

from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.ffn.weights import LinearMap
from tests.compressors.random_ffn import FORMS, all_tensors, direct_output, random_ffn, random_inputs

pytestmark = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)


def test_a_dense_ffn_is_a_sum_over_its_neurons(shape: FFNShape) -> None:
    ffn = random_ffn(shape)
    (x_TD,) = random_inputs(shape.hidden_size, sizes=(64,))
    torch.testing.assert_close(ffn(x_TD).double(), direct_output(ffn, x_TD), rtol=1e-4, atol=1e-5)


def test_heavy_plus_light_equals_dense(shape: FFNShape) -> None:
    ffn = random_ffn(shape)
    (x_TD,) = random_inputs(shape.hidden_size, sizes=(64,))
    for count in (1, 7, 24, 47):
        heavy = torch.randperm(shape.num_neurons, generator=torch.Generator().manual_seed(count))[:count]
        split = ffn.split(heavy.sort().values)
        assert split.heavy is not None and split.light is not None
        assert (len(split.heavy.neurons), len(split.light.neurons)) == (count, shape.num_neurons - count)
        together = torch.cat([split.heavy.neurons, split.light.neurons]).sort().values
        assert torch.equal(together, torch.arange(shape.num_neurons))
        torch.testing.assert_close(split(x_TD), ffn(x_TD), rtol=1e-4, atol=1e-5)


def test_splitting_off_nothing_or_everything_leaves_one_part(shape: FFNShape) -> None:
    ffn = random_ffn(shape)
    everything = ffn.split(torch.arange(shape.num_neurons))
    nothing = ffn.split(torch.arange(0))
    assert everything.light is None and nothing.heavy is None
    assert everything.layout == LayerLayout.dense(shape)
    for split in (everything, nothing):
        assert all(map(torch.equal, all_tensors(split), all_tensors(ffn)))


def test_a_split_has_as_many_elements_as_the_dense_ffn(shape: FFNShape) -> None:
    split = random_ffn(shape).split(torch.arange(10))
    assert split.layout.num_elements(shape) == shape.num_elements
    assert sum(tensor.numel() for tensor in all_tensors(split)) == shape.num_elements


def test_a_low_rank_map_is_the_product_of_its_factors(shape: FFNShape) -> None:
    left, right, bias = torch.randn(9, 3), torch.randn(3, shape.hidden_size), torch.randn(9)
    linear = LinearMap.low_rank(left, right, bias)
    (x_TD,) = random_inputs(shape.hidden_size, sizes=(5,))
    torch.testing.assert_close(linear(x_TD), x_TD @ (left @ right).T + bias)
    torch.testing.assert_close(linear.weight, left @ right)
