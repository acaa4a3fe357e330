"""Second moments are multiplied in float64, and systems with them have sane solutions whatever the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ffsplit.compressors import LowRankCompressor, PruneCompressor, QuantizeCompressor
from ffsplit.compressors.base import LayerContext
from ffsplit.compressors.layer import compress_layer
from ffsplit.compressors.least_squares import damped_root, refit_down, second_moment, solve_ridge
from ffsplit.errors import CalibrationError
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def almost_alike(num_tokens: int, width: int, *, difference: float) -> Tensor:
    """Pairs of columns that differ by so little."""
    half = normal(num_tokens, width // 2)
    return torch.cat([half, half + difference * normal(num_tokens, width // 2, seed=1)], dim=1)


def linear_ffn(down_DN: Tensor) -> FFNWeights:
    """Its activations are its inputs."""
    num_neurons = down_DN.shape[1]
    part = FFNPart(
        torch.arange(num_neurons), LinearMap.dense(torch.eye(num_neurons)), None, LinearMap.dense(down_DN)
    )
    return FFNWeights(part, None, None, lambda x: x)


@pytest.mark.parametrize("width", [1, 3, 10, 64])
def test_second_moments_are_numpys_in_float64(width: int) -> None:
    chunks = [normal(700, width), normal(1500, width, seed=1)]
    expected = sum(x.numpy().astype(np.float64).T @ x.numpy().astype(np.float64) for x in chunks)
    np.testing.assert_allclose(second_moment(chunks).numpy(), expected, rtol=1e-13, atol=1e-10)


def test_what_float32_products_lose_is_there() -> None:
    """The smallest eigenvalue is 1e-10 of the largest, a thousandth of float32's rounding."""
    x_TN = almost_alike(3000, 16, difference=2e-5)
    expected = np.linalg.svd(x_TN.double().numpy(), compute_uv=False) ** 2
    found = np.linalg.eigvalsh(second_moment([x_TN]).numpy())[::-1]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    in_float32 = np.linalg.eigvalsh((x_TN.T @ x_TN).double().numpy())
    assert abs(in_float32[0] / expected[-1] - 1) > 0.5


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_a_refit_finds_the_weights_of_inputs_that_are_almost_alike(ridge: float) -> None:
    x_TN = almost_alike(3000, 16, difference=1e-4)
    original, start = linear_ffn(normal(16, 16)), linear_ffn(normal(16, 16, seed=3))
    fitted = refit_down(start, context=LayerContext(original, [x_TN]), ridge=ridge)
    assert fitted.heavy is not None and original.heavy is not None
    expected = original.heavy.down.weight
    assert (fitted.heavy.down.weight - expected).norm() < 0.02 * expected.norm()


def test_a_solution_does_not_depend_on_the_scale_of_a_neuron() -> None:
    """What can be resolved of a neuron is in proportion to its own activations."""
    x_TN, y_TD = normal(400, 6).double(), normal(400, 3, seed=1).double()
    scale = torch.logspace(-12, 12, 6, dtype=torch.float64)
    plain, scaled = (solve_ridge(x.T @ x, x.T @ y_TD, ridge=0.0, num_ridged=6) for x in (x_TN, x_TN * scale))
    torch.testing.assert_close(scaled * scale[:, None], plain, rtol=1e-9, atol=1e-12)


SINGULAR: dict[str, Any] = {
    "copies": lambda width: normal(300, width // 2).repeat(1, 2),
    "silent": lambda width: torch.cat([normal(300, width - 3), torch.zeros(300, 3)], dim=1),
    "few tokens": lambda width: normal(5, width),
    "one token": lambda width: normal(1, width),
    "nothing": lambda width: torch.zeros(20, width),
    "constant": lambda width: torch.full((300, width), 3.0),
    "large and small": lambda width: normal(300, width) * torch.logspace(-15, 8, width),
}


@pytest.mark.parametrize("inputs", SINGULAR)
@pytest.mark.parametrize(
    "step",
    [
        PruneCompressor(compensation="least_squares", ridge=0),
        PruneCompressor(order="optimal_brain", compensation="least_squares", ridge=0),
        LowRankCompressor(whiten=True, ridge=0),
        QuantizeCompressor(method="gptq", num_bits=4, ridge=0),
    ],
    ids=lambda step: f"{step.kind}-{getattr(step, 'order', '')}",
)
def test_no_ridge_and_singular_inputs_give_finite_weights(step: Any, inputs: str) -> None:
    """Whose error is not above that of a fit with a ridge by more than rounding makes it."""
    shape = FFNShape(num_neurons=16, hidden_size=8, gated=False, up_bias=False, down_bias=False)
    x_TD = SINGULAR[inputs](8)
    errors = [_error(step.model_copy(update={"ridge": ridge}), shape, [x_TD]) for ridge in (0.0, 1e-3)]
    assert errors[0] <= 1.1 * errors[1] + 0.02


def _error(step: Any, shape: FFNShape, inputs: Sequence[Tensor]) -> float:
    part = FFNPart(
        torch.arange(16), LinearMap.dense(normal(16, 8)), None, LinearMap.dense(normal(8, 16, seed=1))
    )
    dense = LayerLayout.dense(shape)
    split = LayerLayout(
        heavy=LayerLayout.dense(shape, 8).heavy, light=LayerLayout.dense(shape, 8).heavy, down_bias=False
    )
    start = dense if step.kind == "quantize" else split
    layout = step.plan(start, shape=shape, budget=shape.num_elements * 3 // 4 if start is split else 10**9)
    assert layout is not None
    made = compress_layer(
        FFNWeights(part, None, None, torch.relu),
        heavy_neurons=range(start.heavy.num_neurons),  # type: ignore[union-attr]
        layout=layout,
        steps=[step],
        inputs=inputs,
    )
    for each in made.weights.parts:
        for linear in (each.up, each.down):
            assert linear.weight.isfinite().all()
    return made.relative_error


def test_what_is_not_finite_is_named() -> None:
    moment = torch.eye(3, dtype=torch.float64)
    moment[1, 1] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        damped_root(moment, torch.zeros(3, dtype=torch.float64))
