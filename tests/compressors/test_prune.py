"""Dropping nothing changes nothing, and a refit never makes it worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ffsplit.compressors import PruneCompressor
from ffsplit.compressors.base import CHUNK_TOKENS, LayerContext, relative_error
from ffsplit.compressors.layer import compress_layer
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap
from tests.compressors.random_ffn import FORMS, all_tensors, direct_output, random_ffn, random_inputs

forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)


def duplicated(ffn: FFNWeights) -> FFNWeights:
    """The same FFN written with every neuron twice, half the output each."""
    assert ffn.heavy is not None

    def twice(linear: LinearMap) -> LinearMap:
        bias = None if linear.bias is None else torch.cat([linear.bias, linear.bias])
        return LinearMap.dense(torch.cat([linear.weight, linear.weight]), bias)

    part = FFNPart(
        neurons=torch.arange(2 * len(ffn.heavy.neurons)),
        up=twice(ffn.heavy.up),
        gate=None if ffn.heavy.gate is None else twice(ffn.heavy.gate),
        down=LinearMap.dense(torch.cat([ffn.heavy.down.weight] * 2, dim=1) / 2),
    )
    return replace(ffn, heavy=part)


def pruned(
    ffn: FFNWeights, shape: FFNShape, width: int, step: PruneCompressor, inputs: list[torch.Tensor]
) -> FFNWeights:
    layout = LayerLayout.dense(shape, width)
    return compress_layer(ffn, heavy_neurons=range(width), layout=layout, steps=[step], inputs=inputs).weights


@forms
@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_pruning_nothing_changes_nothing(shape: FFNShape, compensation: str) -> None:
    ffn = random_ffn(shape)
    step = PruneCompressor.model_validate({"compensation": compensation})
    same = pruned(ffn, shape, shape.num_neurons, step, random_inputs(shape.hidden_size))
    assert all(map(torch.equal, all_tensors(same), all_tensors(ffn)))


@forms
def test_pruning_alone_is_the_sum_over_the_neurons_that_are_left(shape: FFNShape) -> None:
    ffn = random_ffn(shape)
    (x_TD,) = inputs = random_inputs(shape.hidden_size, sizes=(50,))
    left = pruned(ffn, shape, 20, PruneCompressor(), inputs)
    assert left.light is None and left.heavy is not None
    torch.testing.assert_close(left(x_TD).double(), direct_output(left, x_TD), rtol=1e-4, atol=1e-5)
    assert ffn.heavy is not None
    assert torch.equal(left.heavy.down.weight, ffn.heavy.down.weight[:, :20])


@forms
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("num_tokens", [10, 500])
def test_a_refit_is_never_worse_than_none_on_its_inputs(
    shape: FFNShape, ridge: float, num_tokens: int
) -> None:
    ffn = random_ffn(shape)
    inputs = random_inputs(shape.hidden_size, sizes=(num_tokens,))
    context = LayerContext(ffn, inputs)
    step = PruneCompressor(compensation="least_squares", ridge=ridge)
    for width in (5, 24, 40):
        without = relative_error(pruned(ffn, shape, width, PruneCompressor(), inputs), context)
        refitted = relative_error(pruned(ffn, shape, width, step, inputs), context)
        assert refitted <= without * (1 + 1e-6)


@forms
def test_a_refit_recovers_a_redundant_ffn(shape: FFNShape) -> None:
    ffn = duplicated(random_ffn(shape))
    doubled = shape.model_copy(update={"num_neurons": 2 * shape.num_neurons})
    inputs = random_inputs(shape.hidden_size, sizes=(400, 300))
    context = LayerContext(ffn, inputs)
    step = PruneCompressor(compensation="least_squares", ridge=0.0)
    assert relative_error(pruned(ffn, doubled, shape.num_neurons, PruneCompressor(), inputs), context) > 0.2
    assert relative_error(pruned(ffn, doubled, shape.num_neurons, step, inputs), context) < 1e-4


@forms
def test_a_refit_solves_the_ridge_problem_it_documents(shape: FFNShape) -> None:
    """Against one solve of the stacked least-squares system in float64."""
    ridge, width = 1e-2, 20
    ffn = random_ffn(shape)
    inputs = random_inputs(shape.hidden_size)
    refitted = pruned(ffn, shape, width, PruneCompressor(compensation="least_squares", ridge=ridge), inputs)
    dropped = pruned(ffn, shape, width, PruneCompressor(), inputs)
    assert refitted.heavy is not None and dropped.heavy is not None
    x_TD = torch.cat(inputs)
    a_TN = dropped.heavy.hidden(x_TD, dropped.activation).double()
    damping = (ridge * a_TN.square().sum(0).mean()).sqrt() * torch.eye(width, dtype=torch.float64)
    if shape.down_bias:
        a_TN = torch.cat([a_TN, torch.ones(len(a_TN), 1, dtype=torch.float64)], dim=1)
        damping = torch.cat([damping, torch.zeros(width, 1, dtype=torch.float64)], dim=1)
    residual_TD = direct_output(ffn, x_TD) - direct_output(dropped, x_TD)
    target = torch.cat([residual_TD, torch.zeros(width, shape.hidden_size, dtype=torch.float64)])
    change = torch.linalg.lstsq(torch.cat([a_TN, damping]), target).solution
    weight = dropped.heavy.down.weight + change[:width].T
    torch.testing.assert_close(refitted.heavy.down.weight.double(), weight, rtol=1e-3, atol=1e-4)
    if shape.down_bias:
        assert refitted.down_bias is not None and dropped.down_bias is not None
        bias = dropped.down_bias + change[width]
        torch.testing.assert_close(refitted.down_bias.double(), bias, rtol=1e-3, atol=1e-4)


def test_chunks_are_every_input_in_order_and_bounded() -> None:
    inputs = random_inputs(2, sizes=(CHUNK_TOKENS + 5, 3, 2 * CHUNK_TOKENS))
    chunks = list(LayerContext(random_ffn(FORMS["plain"]), inputs).chunks())
    assert [len(chunk) for chunk in chunks] == [CHUNK_TOKENS, 5, 3, CHUNK_TOKENS, CHUNK_TOKENS]
    assert torch.equal(torch.cat(chunks), torch.cat(inputs))


def test_the_plan_drops_the_light_part_and_refuses_to_drop_everything() -> None:
    shape = FORMS["gated-biased"]
    layout = random_ffn(shape).split(torch.arange(10)).layout
    budget = LayerLayout.dense(shape, 10).num_elements(shape)
    step = PruneCompressor()
    assert step.plan(layout, shape=shape, budget=budget) == LayerLayout.dense(shape, 10)
    assert step.plan(layout, shape=shape, budget=budget - 1) is None
    without_heavy = layout.model_copy(update={"heavy": None})
    assert step.plan(without_heavy, shape=shape, budget=budget) is None
