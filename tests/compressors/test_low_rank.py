"""Full rank equals the original, and the error falls as the rank grows."""

from __future__ import annotations

import pytest
import torch

from ffsplit.compressors import LowRankCompressor
from ffsplit.compressors.base import LayerContext, relative_error
from ffsplit.compressors.low_rank import truncated_svd
from ffsplit.ffn.shapes import Dense, FFNShape, LayerLayout, LowRank, PartLayout
from ffsplit.ffn.weights import FFNWeights
from tests.compressors.random_ffn import FORMS, random_ffn, random_inputs


def at_rank(
    ffn: FFNWeights, shape: FFNShape, rank: int, *, num_heavy: int, context: LayerContext
) -> FFNWeights:
    """The FFN with its last neurons at some rank, without regard to a budget."""
    split = ffn.split(torch.arange(num_heavy))
    format = LowRank(rank=rank)
    light = PartLayout(
        num_neurons=shape.num_neurons - num_heavy,
        up=format,
        gate=format if shape.gated else None,
        down=format,
    )
    layout = split.layout.model_copy(update={"light": light})
    compressed = LowRankCompressor().compress(split, layout=layout, context=context)
    assert compressed.layout == layout
    return compressed


@pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_heavy", [0, 12])
def test_full_rank_equals_the_original_and_the_error_falls_with_rank(shape: FFNShape, num_heavy: int) -> None:
    ffn = random_ffn(shape)
    context = LayerContext(ffn, random_inputs(shape.hidden_size))
    errors = [
        relative_error(at_rank(ffn, shape, rank, num_heavy=num_heavy, context=context), context)
        for rank in (1, 4, 8, 12, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-5


def test_truncated_svd_is_the_best_approximation_of_its_rank() -> None:
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    singular_values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 5, 12):
        left, right = truncated_svd(matrix, rank=rank)
        assert left.shape == (20, rank) and right.shape == (rank, 12)
        error = (matrix - left @ right).double().square().sum()
        assert float(error) == pytest.approx(float(singular_values[rank:].square().sum()), abs=1e-8, rel=1e-4)
        norms = left.norm(dim=0), right.norm(dim=1)
        torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)


def test_the_plan_takes_the_largest_rank_that_fits() -> None:
    shape = FFNShape(num_neurons=96, hidden_size=32, gated=False, up_bias=True, down_bias=True)
    layout = LayerLayout(heavy=None, light=PartLayout.dense(shape, 96), down_bias=True)
    budget = 96 + 32 + 5 * 2 * (96 + 32)
    for spare, rank in ((0, 5), (255, 5), (256, 6), (-1, 4)):
        planned = LowRankCompressor().plan(layout, shape=shape, budget=budget + spare)
        assert planned is not None and planned.light is not None
        assert planned.light.up == planned.light.down == LowRank(rank=rank)
        assert planned.num_elements(shape) <= budget + spare
    assert LowRankCompressor().plan(layout, shape=shape, budget=96 + 32 + 255) is None


@pytest.mark.parametrize(
    ("budget", "most", "rank"), [(1_025_000, 132, 128), (1_100_000, 142, 136), (90_000, 11, 11)]
)
def test_the_plan_takes_a_rank_that_kernels_like_where_one_is_near(budget: int, most: int, rank: int) -> None:
    """128 would give up 2.3 % of the FFN for 142, and 8 more than a twelfth of 11."""
    shape = FFNShape(num_neurons=3072, hidden_size=768, gated=False, up_bias=True, down_bias=True)
    layout = LayerLayout(heavy=None, light=PartLayout.dense(shape, 3072), down_bias=True)
    for multiple, expected in ((None, rank), (1, most), (48, most // 48 * 48)):
        planned = LowRankCompressor().plan(layout, shape=shape, budget=budget, multiple=multiple)
        if expected == 0:
            assert planned is None
            continue
        assert planned is not None and planned.light is not None
        assert planned.light.up == planned.light.down == LowRank(rank=expected)
        assert planned.num_elements(shape) <= budget


def test_factors_no_smaller_than_the_matrix_leave_it_dense() -> None:
    shape = FFNShape(num_neurons=96, hidden_size=32, gated=True, up_bias=False, down_bias=False)
    layout = LayerLayout(heavy=None, light=PartLayout.dense(shape, 96), down_bias=False)
    planned = LowRankCompressor().plan(layout, shape=shape, budget=shape.num_elements)
    assert planned is not None and planned.light is not None
    assert planned.light.up == planned.light.gate == Dense() == planned.light.down


def test_an_ffn_without_a_light_part_is_planned_as_it_is_where_it_fits() -> None:
    shape = FORMS["gated"]
    layout = LayerLayout.dense(shape, 20)
    size = layout.num_elements(shape)
    assert LowRankCompressor().plan(layout, shape=shape, budget=size) == layout
    assert LowRankCompressor().plan(layout, shape=shape, budget=size - 1) is None
