"""A fitted FFN is closer to its original than the one it started from, and no larger."""

from __future__ import annotations

import pytest
import torch

from ffsplit.compressors import DistillCompressor, PruneCompressor
from ffsplit.compressors.base import OutputNorm
from ffsplit.compressors.distill import rate_scale
from ffsplit.compressors.layer import compress_layer
from ffsplit.ffn import FFNShape, LayerLayout, PartLayout
from tests.compressors.random_ffn import FORMS, all_tensors, random_ffn, random_inputs

forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
REFIT = PruneCompressor(compensation="least_squares")
SIZES = (600, 500)


def output_norm(hidden_size: int) -> OutputNorm:
    generator = torch.Generator().manual_seed(3)
    weight = 1 + 0.2 * torch.randn(hidden_size, generator=generator)
    return OutputNorm(weight, 0.1 * torch.randn(hidden_size, generator=generator), eps=1e-12)


@forms
@pytest.mark.parametrize("with_norm", [False, True])
def test_fitting_lowers_the_error_of_a_refit(shape: FFNShape, with_norm: bool) -> None:
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)
    norm = output_norm(shape.hidden_size) if with_norm else None
    fit = DistillCompressor(num_steps=60, batch_tokens=256)
    errors = [
        compress_layer(
            ffn,
            heavy_neurons=range(20),
            layout=LayerLayout.dense(shape, 20),
            steps=steps,
            inputs=inputs,
            output_norm=norm,
        ).relative_error
        for steps in ([REFIT], [REFIT, fit])
    ]
    assert errors[1] < 0.97 * errors[0]


@forms
def test_all_neurons_are_left_as_they_are(shape: FFNShape) -> None:
    ffn = random_ffn(shape)
    made = compress_layer(
        ffn,
        heavy_neurons=range(shape.num_neurons),
        layout=LayerLayout.dense(shape),
        steps=[REFIT, DistillCompressor(num_steps=3)],
        inputs=random_inputs(shape.hidden_size),
    )
    assert all(map(torch.equal, all_tensors(made.weights), all_tensors(ffn)))


@forms
def test_light_neurons_are_narrowed_beside_exact_heavy_hitters(shape: FFNShape) -> None:
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)
    assert ffn.heavy is not None
    step = DistillCompressor(part="light", num_steps=60, batch_tokens=256)
    split = LayerLayout.dense(shape, 10).model_copy(
        update={"light": PartLayout.dense(shape, shape.num_neurons - 10)}
    )
    budget = LayerLayout.dense(shape, 22).num_elements(shape)
    layout = step.plan(split, shape=shape, budget=budget)
    assert layout is not None and layout.light is not None
    assert layout.light.num_neurons == 12
    assert layout.num_elements(shape) <= budget
    made = compress_layer(ffn, heavy_neurons=range(10), layout=layout, steps=[step], inputs=inputs)
    assert made.weights.heavy is not None
    assert torch.equal(made.weights.heavy.up.weight, ffn.heavy.up.weight[:10])
    assert torch.equal(made.weights.heavy.down.weight, ffn.heavy.down.weight[:, :10])
    dropped = compress_layer(
        ffn, heavy_neurons=range(10), layout=LayerLayout.dense(shape, 10), steps=[REFIT], inputs=inputs
    )
    assert made.relative_error < dropped.relative_error


def test_a_fit_that_goes_astray_is_not_taken() -> None:
    shape = next(iter(FORMS.values()))
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)
    astray = DistillCompressor(num_steps=5, batch_tokens=64, learning_rate=50.0)
    refitted, fitted = (
        compress_layer(
            ffn, heavy_neurons=range(20), layout=LayerLayout.dense(shape, 20), steps=steps, inputs=inputs
        )
        for steps in ([REFIT], [REFIT, astray])
    )
    assert all(map(torch.equal, all_tensors(fitted.weights), all_tensors(refitted.weights)))
    assert fitted.relative_error == refitted.relative_error


@pytest.mark.parametrize(
    ("shape", "scale"), [((8,), 1.0), ((4096,), 1.0), ((4, 1024), 1.0), ((4096, 16), 1.0), ((16, 4096), 0.25)]
)
def test_wide_matrices_are_fitted_at_a_lower_rate(shape: tuple[int, ...], scale: float) -> None:
    assert rate_scale(torch.zeros(shape)) == scale


def test_the_same_arguments_give_the_same_bytes() -> None:
    shape = next(iter(FORMS.values()))
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)
    before = [tensor.clone() for tensor in all_tensors(ffn)]
    made = [
        compress_layer(
            ffn,
            heavy_neurons=range(20),
            layout=LayerLayout.dense(shape, 20),
            steps=[REFIT, DistillCompressor(num_steps=10)],
            inputs=inputs,
        ).weights
        for _ in range(2)
    ]
    assert all(map(torch.equal, all_tensors(made[0]), all_tensors(made[1])))
    assert all(map(torch.equal, all_tensors(ffn), before))
