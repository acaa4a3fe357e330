"""A fitted FFN is closer to its original than the one it started from, and no larger."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from ffsplit.compressors import DistillCompressor, PruneCompressor, distill
from ffsplit.compressors.base import LayerContext, OutputNorm, relative_error
from ffsplit.compressors.distill import rate_scale
from ffsplit.compressors.layer import CompressedLayer, compress_layer, refit_layer
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, PartLayout
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
def test_products_in_bfloat16_fit_as_well(shape: FFNShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor has: autocast computes in bfloat16 on any."""
    monkeypatch.setattr(distill, "multiplies_bfloat16", lambda device: True)
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)
    fitted = [
        compress_layer(
            ffn,
            heavy_neurons=range(20),
            layout=LayerLayout.dense(shape, 20),
            steps=[REFIT, DistillCompressor(num_steps=60, batch_tokens=256, mixed_precision=precision)],
            inputs=inputs,
        )
        for precision in ("no", "auto")
    ]
    full, mixed = fitted
    assert mixed.relative_error == pytest.approx(full.relative_error, rel=0.02)
    assert mixed.relative_error != full.relative_error
    assert all(tensor.dtype == torch.float32 for tensor in all_tensors(mixed.weights))


def test_a_host_without_bfloat16_products_says_so_and_gives_no_other_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that has them does without, where the run was settled so."""
    shape = FORMS["plain"]
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)

    def fit(*, in_bfloat16: bool) -> CompressedLayer:
        step = DistillCompressor(num_steps=5, batch_tokens=64).settled(in_bfloat16=in_bfloat16)
        layout = LayerLayout.dense(shape, 20)
        return compress_layer(ffn, heavy_neurons=range(20), layout=layout, steps=[REFIT, step], inputs=inputs)

    made: dict[tuple[bool, bool], list[torch.Tensor]] = {}
    for able in (True, False):
        monkeypatch.setattr(distill, "multiplies_bfloat16", lambda device, able=able: able)
        for in_bfloat16 in (True, False) if able else (False,):
            made[able, in_bfloat16] = list(all_tensors(fit(in_bfloat16=in_bfloat16).weights))
    with pytest.raises(ConfigError, match=r"host .*: this run fits layers with bfloat16.*--dtype float32"):
        fit(in_bfloat16=True)
    assert all(map(torch.equal, made[True, False], made[False, False]))
    assert not all(map(torch.equal, made[True, True], made[True, False]))


def test_own_inputs_are_fitted_beside_the_originals() -> None:
    """With the same targets: what the original passes on of its own inputs."""
    shape = FORMS["plain"]
    inputs = random_inputs(shape.hidden_size, sizes=SIZES)
    own = [0.5 * x_TD for x_TD in inputs]
    norm = output_norm(shape.hidden_size)
    context = LayerContext(random_ffn(shape), inputs, norm, own)
    alone = LayerContext(random_ffn(shape), inputs, norm)
    examples_TD, targets_TD = context.examples()
    assert torch.equal(examples_TD, torch.cat([*own, *inputs]))
    assert torch.equal(targets_TD, alone.examples()[1])
    x_TD = inputs[0][:5]
    assert torch.allclose(targets_TD[:5], norm(x_TD + context.original(x_TD)), atol=1e-6)


@forms
@pytest.mark.parametrize("with_norm", [False, True])
def test_fitting_again_makes_up_for_what_the_layers_before_have_changed(
    shape: FFNShape, with_norm: bool
) -> None:
    """The compressed model gives the layer other inputs for the same tokens; both see the same targets."""
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size, sizes=SIZES)
    own = [0.9 * x_TD + 0.1 for x_TD in inputs]
    norm = output_norm(shape.hidden_size) if with_norm else None
    narrow = compress_layer(
        ffn,
        heavy_neurons=range(20),
        layout=LayerLayout.dense(shape, 20),
        steps=[REFIT],
        inputs=inputs,
        output_norm=norm,
    )
    context = LayerContext(ffn, inputs, norm, own)
    drifted = relative_error(narrow.weights, context)
    fit = DistillCompressor(num_steps=60, batch_tokens=256)
    again = refit_layer(narrow.weights, fit, context=context)
    assert again.relative_error == relative_error(again.weights, context) < 0.9 * drifted
    assert again.weights.layout == narrow.weights.layout


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
    split = with_light_part(shape, 10)
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


@pytest.mark.parametrize(
    ("asked", "in_bfloat16", "settled"),
    [("auto", True, "bfloat16"), ("auto", False, "no"), ("no", True, "no"), ("bfloat16", False, "bfloat16")],
)
def test_a_precision_that_is_named_is_not_settled_anew(
    asked: Literal["auto", "bfloat16", "no"], in_bfloat16: bool, settled: str
) -> None:
    step = DistillCompressor(mixed_precision=asked).settled(in_bfloat16=in_bfloat16)
    assert step.mixed_precision == settled


def with_light_part(shape: FFNShape, num_heavy: int) -> LayerLayout:
    light = PartLayout.dense(shape, shape.num_neurons - num_heavy)
    return LayerLayout.dense(shape, num_heavy).model_copy(update={"light": light})


@forms
def test_heavy_hitters_that_leave_no_room_have_no_plan(shape: FFNShape) -> None:
    step, split = DistillCompressor(part="light"), with_light_part(shape, 10)
    for num_neurons, width in ((10, None), (11, 1)):
        budget = LayerLayout.dense(shape, num_neurons).num_elements(shape)
        layout = step.plan(split, shape=shape, budget=budget)
        assert (layout and layout.light and layout.light.num_neurons) == width


@pytest.mark.parametrize(
    ("num_heavy", "multiple", "num_light"), [(500, None, 12), (512, None, 30), (500, 1, 42), (256, 128, 256)]
)
def test_heavy_and_light_neurons_together_are_a_multiple(
    num_heavy: int, multiple: int | None, num_light: int
) -> None:
    """A checkpoint stores both as one: 542 fit, and 512 are near, unless no light neuron would be left."""
    shape = FFNShape(num_neurons=1536, hidden_size=8, gated=False, up_bias=False, down_bias=False)
    step, budget = DistillCompressor(part="light"), LayerLayout.dense(shape, 542).num_elements(shape)
    layout = step.plan(with_light_part(shape, num_heavy), shape=shape, budget=budget, multiple=multiple)
    assert layout is not None and layout.light is not None and layout.light.num_neurons == num_light
    assert step.plan(with_light_part(shape, 512), shape=shape, budget=budget, multiple=64) is None


@forms
def test_light_neurons_that_all_fit_are_left_as_they_are(shape: FFNShape) -> None:
    ffn = random_ffn(shape)
    made = compress_layer(
        ffn,
        heavy_neurons=range(10),
        layout=with_light_part(shape, 10),
        steps=[DistillCompressor(part="light", num_steps=3)],
        inputs=random_inputs(shape.hidden_size),
    )
    split = ffn.split(torch.arange(10))
    assert all(map(torch.equal, all_tensors(made.weights), all_tensors(split)))
