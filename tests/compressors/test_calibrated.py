"""Compressors that look at inputs beat those that do not, on what they looked at."""

from __future__ import annotations

import pytest
import torch

from ffsplit.compressors import LowRankCompressor, PruneCompressor
from ffsplit.compressors.layer import CompressedLayer, compress_layer
from ffsplit.compressors.low_rank import truncated_svd
from ffsplit.ffn.shapes import FFNShape, LayerLayout, LowRank
from tests.compressors.random_ffn import FORMS, random_ffn, random_inputs

forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)


def skewed_inputs(hidden_size: int) -> list[torch.Tensor]:
    """Inputs that vary far more in some directions than in others, as real ones do."""
    spread = torch.logspace(0.5, -1.5, hidden_size)
    return [x_TD * spread for x_TD in random_inputs(hidden_size, sizes=(700, 500))]


def compressed(shape: FFNShape, step: LowRankCompressor | PruneCompressor, width: int) -> CompressedLayer:
    budget = LayerLayout.dense(shape, 24).num_elements(shape) + shape.hidden_size
    split = LayerLayout(
        heavy=LayerLayout.dense(shape, width).heavy if width else None,
        light=LayerLayout.dense(shape, shape.num_neurons - width).heavy,
        down_bias=shape.down_bias,
    )
    layout = step.plan(split, shape=shape, budget=budget)
    assert layout is not None
    return compress_layer(
        random_ffn(shape),
        heavy_neurons=range(width),
        layout=layout,
        steps=[step],
        inputs=skewed_inputs(shape.hidden_size),
    )


@forms
def test_whitening_lowers_the_error_of_a_plain_svd(shape: FFNShape) -> None:
    plain, whitened = (
        compressed(shape, LowRankCompressor(whiten=whiten), 0).relative_error for whiten in (False, True)
    )
    assert whitened < plain


def test_whitening_by_the_identity_is_the_plain_svd() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    plain = truncated_svd(weight, rank=5)
    same = truncated_svd(weight, rank=5, root=torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(same[0] @ same[1], plain[0] @ plain[1])


def test_energy_stops_at_the_rank_that_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 4, generator=generator)).Q
    weight = basis @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.1])) @ torch.eye(4, 9)
    assert truncated_svd(weight, rank=9, energy=0.75)[0].shape[1] == 1
    assert truncated_svd(weight, rank=9, energy=0.95)[0].shape[1] == 2
    assert truncated_svd(weight, rank=2, energy=1.0)[0].shape[1] == 2


@forms
def test_a_rank_by_energy_is_never_above_the_budgets(shape: FFNShape) -> None:
    whole, less = (compressed(shape, LowRankCompressor(energy=energy), 0) for energy in (1.0, 0.3))
    ranks = []
    for made in (whole, less):
        assert made.weights.light is not None
        assert isinstance(made.weights.light.up.format, LowRank)
        ranks.append(made.weights.light.up.format.rank)
    assert ranks[1] < ranks[0]
    assert less.relative_error > whole.relative_error


@forms
def test_compensations_are_each_better_than_the_one_before(shape: FFNShape) -> None:
    errors = [
        compressed(shape, PruneCompressor.model_validate({"compensation": name}), 20).relative_error
        for name in ("none", "bias", "least_squares")
    ]
    assert errors[0] > errors[1] > errors[2]


@forms
def test_a_bias_is_planned_where_there_was_none(shape: FFNShape) -> None:
    made = compressed(shape, PruneCompressor(compensation="bias"), 20)
    assert made.weights.layout.down_bias
    assert made.weights.down_bias is not None


@forms
def test_the_optimal_brain_order_beats_an_arbitrary_one(shape: FFNShape) -> None:
    arbitrary, chosen = (
        compressed(
            shape, PruneCompressor.model_validate({"compensation": "least_squares", "order": order}), 20
        )
        for order in ("score", "optimal_brain")
    )
    assert chosen.relative_error < arbitrary.relative_error
    assert chosen.weights.heavy is not None
    assert len(chosen.weights.heavy.neurons) == 20
