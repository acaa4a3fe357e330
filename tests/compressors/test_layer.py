"""One layer through every shipped recipe: what was planned, pure, and the same bytes each time."""

from __future__ import annotations

import pytest
import torch

from ffsplit.compressors.layer import CompressedLayer, compress_layer
from ffsplit.ffn.shapes import FFNShape, LayerLayout, LowRank, PartLayout
from ffsplit.recipes import shipped_recipes
from ffsplit.splitting.layer import uniform_layouts
from tests.compressors.random_ffn import FORMS, all_tensors, direct_output, random_ffn, random_inputs
from tests.short_recipes import short_recipe

every_case = pytest.mark.parametrize(
    ("shape", "recipe", "keep"),
    [
        pytest.param(shape, recipe, keep, id=f"{form}-{recipe}-{keep}")
        for form, shape in FORMS.items()
        for recipe in shipped_recipes()
        for keep in (0.3535, 0.7)
    ],
)

SHAPE = FORMS["plain-biased"]
LOW_RANK_LIGHT = PartLayout(num_neurons=28, up=LowRank(rank=2), down=LowRank(rank=2))


def compressed(shape: FFNShape, recipe: str, keep: float) -> tuple[CompressedLayer, list[list[torch.Tensor]]]:
    """The result, and the arguments' tensors before and after."""
    chosen = short_recipe(recipe)
    (layout,) = uniform_layouts([shape], keep=keep, heavy=chosen.heavy, steps=chosen.steps)
    ffn, inputs = random_ffn(shape), random_inputs(shape.hidden_size)
    width = layout.heavy.num_neurons if layout.heavy is not None else 0
    heavy = range(shape.num_neurons - width, shape.num_neurons)
    before = [tensor.clone() for tensor in [*all_tensors(ffn), *inputs]]
    result = compress_layer(ffn, heavy_neurons=heavy, layout=layout, steps=chosen.steps, inputs=inputs)
    assert result.weights.layout == layout
    return result, [before, [*all_tensors(ffn), *inputs]]


@pytest.mark.matrix()
@every_case
def test_elements_counted_are_the_elements_of_the_tensors(shape: FFNShape, recipe: str, keep: float) -> None:
    weights = compressed(shape, recipe, keep)[0].weights
    tensors = all_tensors(weights)
    assert weights.layout.num_elements(shape) == sum(tensor.numel() for tensor in tensors)
    assert weights.layout.size_bytes(shape, 4) == sum(tensor.nbytes for tensor in tensors)
    assert weights.layout.size_bytes(shape, 2) == sum(tensor.half().nbytes for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) <= keep * shape.num_elements


@pytest.mark.matrix()
@every_case
def test_nothing_is_mutated_and_the_bytes_repeat(shape: FFNShape, recipe: str, keep: float) -> None:
    first, (before, after) = compressed(shape, recipe, keep)
    second, _ = compressed(shape, recipe, keep)
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, all_tensors(first.weights), all_tensors(second.weights)))
    assert first.relative_error == second.relative_error


@pytest.mark.matrix()
@every_case
def test_the_relative_error_is_that_of_the_outputs(shape: FFNShape, recipe: str, keep: float) -> None:
    result = compressed(shape, recipe, keep)[0]
    x_TD = torch.cat(random_inputs(shape.hidden_size))
    dense = direct_output(random_ffn(shape), x_TD)
    error = (result.weights(x_TD).double() - dense).norm() / dense.norm()
    assert result.relative_error == pytest.approx(float(error), rel=1e-4)
    assert 1e-3 < result.relative_error < 1.2


@pytest.mark.parametrize(
    "planned",
    [
        LayerLayout.dense(SHAPE, 20),
        LayerLayout(heavy=PartLayout.dense(SHAPE, 20), light=LOW_RANK_LIGHT, down_bias=True),
        LayerLayout(heavy=PartLayout.dense(SHAPE, 21), light=PartLayout.dense(SHAPE, 27), down_bias=True),
        LayerLayout(heavy=PartLayout.dense(SHAPE, 20), light=PartLayout.dense(SHAPE, 28), down_bias=False),
    ],
    ids=["parts", "format", "width", "bias"],
)
def test_steps_that_do_not_make_what_was_planned_are_found_out(planned: LayerLayout) -> None:
    with pytest.raises(AssertionError, match=r"planned .*, got "):
        compress_layer(
            random_ffn(SHAPE),
            heavy_neurons=range(20),
            layout=planned,
            steps=[],
            inputs=random_inputs(SHAPE.hidden_size),
        )
