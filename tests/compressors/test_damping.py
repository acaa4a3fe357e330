"""Every fit has an answer, at a ridge of 0 and on samples that leave its system singular."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from ffsplit.compressors import (
    DistillCompressor,
    LowRankCompressor,
    PruneCompressor,
    QuantizeCompressor,
)
from ffsplit.compressors.base import Compressor, LayerContext, relative_error
from ffsplit.compressors.least_squares import ridged_root
from ffsplit.errors import CalibrationError
from ffsplit.ffn.shapes import FFNShape
from ffsplit.ffn.weights import FFNWeights, LinearMap
from tests.compressors.random_ffn import all_tensors, random_ffn, random_inputs

SHAPE = FFNShape(num_neurons=48, hidden_size=16, gated=False, up_bias=True, down_bias=True)
FITS: dict[str, Compressor] = {
    "least squares": PruneCompressor(compensation="least_squares", ridge=0),
    "optimal brain": PruneCompressor(compensation="least_squares", order="optimal_brain", ridge=0),
    "whitened": LowRankCompressor(whiten=True, ridge=0),
    "distilled": DistillCompressor(part="light", num_steps=2, batch_tokens=8, ridge=0),
    "gptq": QuantizeCompressor(num_bits=8, method="gptq", ridge=0),
}


def dead(ffn: FFNWeights, count: int) -> FFNWeights:
    """With `count` neurons that never fire."""
    assert ffn.heavy is not None
    up = ffn.heavy.up
    assert up.bias is not None
    bias = up.bias.clone()
    bias[:count] = -1e4
    heavy = replace(ffn.heavy, up=LinearMap.dense(up.weight, bias))
    return replace(ffn, heavy=heavy, activation=functional.relu)


SAMPLES = {
    "one token": (0, (1,)),
    "fewer tokens than neurons": (0, (5,)),
    "the same token again": (0, (400,)),
    "some dead neurons": (8, (400,)),
    "no neuron that fires": (48, (400,)),
}


@pytest.mark.matrix(pairs=True)
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", FITS)
def test_a_ridge_of_zero_gives_a_finite_result(name: str, sample: str) -> None:
    num_dead, sizes = SAMPLES[sample]
    ffn = dead(random_ffn(SHAPE), num_dead)
    inputs = random_inputs(SHAPE.hidden_size, sizes=sizes)
    if "again" in sample:
        inputs = [each[:1].repeat(len(each), 1) for each in inputs]
    context = LayerContext(ffn, inputs)
    split = ffn.split(torch.arange(24))
    budget = split.layout.num_elements(SHAPE) * 3 // 4
    layout = FITS[name].plan(split.layout, shape=SHAPE, budget=10**9 if name == "gptq" else budget)
    assert layout is not None
    fitted = FITS[name].compress(split, layout=layout, context=context)
    assert all(bool(tensor.isfinite().all()) for tensor in all_tensors(fitted))
    if name == "least squares":  # the sample is matched at least as well as by what it began with
        plain = PruneCompressor().compress(split, layout=layout, context=context)
        assert relative_error(fitted, context) <= relative_error(plain, context) + 1e-6


def test_a_moment_that_has_a_factor_is_factored_as_it_is() -> None:
    x_TN = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = x_TN.T @ x_TN
    root = ridged_root(moment, ridge=0.1)
    torch.testing.assert_close(root @ root.T, moment + 0.1 * moment.diagonal().mean() * torch.eye(8))


def test_a_moment_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        ridged_root(torch.full((2, 2), torch.inf, dtype=torch.float64), ridge=1e-3)
