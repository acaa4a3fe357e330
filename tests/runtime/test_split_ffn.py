"""A split FFN runs as the sum of its parts, in one graph, under autocast and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ffsplit.ffn.quantization import quantize_rows, scales_of
from ffsplit.ffn.shapes import Dense, FFNShape, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.runtime.modules import SplitFFN
from ffsplit.runtime.quantized_linear import QuantizedLinear

INT8, INT4 = Integer(num_bits=8), Integer(num_bits=4, group_size=32)
PARTS = {
    "dense and low rank": (Dense(), LowRank(rank=8)),
    "int8 and int4": (INT8, INT4),
    "dense": (Dense(), None),
    "low rank": (None, LowRank(rank=8)),
    "int8": (INT8, None),
}


def made(parts: str, *, gated: bool, bias: bool = True) -> SplitFFN:
    """A split FFN of 32 inputs, 64 heavy hitters and 32 others, with random weights."""
    shape = FFNShape(num_neurons=96, hidden_size=32, gated=gated, up_bias=bias, down_bias=bias)
    heavy, light = (
        None
        if format is None
        else PartLayout(num_neurons=n, up=format, gate=format if gated else None, down=format)
        for format, n in zip(PARTS[parts], (64, 32), strict=True)
    )
    layout = LayerLayout(heavy=heavy, light=light, down_bias=bias)
    split = SplitFFN(layout, shape, nn.SiLU() if gated else nn.GELU(), guard="down.weight")
    generator = torch.Generator().manual_seed(0)
    for module in split.modules():
        if isinstance(module, QuantizedLinear):
            weight = 0.15 * torch.randn(module.num_rows, module.num_columns, generator=generator)
            options = {"num_bits": module.num_bits, "group_size": module.group_size}
            module.hold(quantize_rows(weight, scales_of(weight, **options), **options))
    for parameter in split.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return split.eval()


def by_parts(split: SplitFFN, x: torch.Tensor) -> torch.Tensor:
    """The sum of its parts by matrices in floating point."""

    def matrix(linear: Any) -> torch.Tensor:
        if isinstance(linear, QuantizedLinear):
            return linear.float_weight(torch.float32)
        return linear.weight if hasattr(linear, "weight") else linear.left @ linear.right

    def product(linear: Any, value: torch.Tensor) -> torch.Tensor:
        y = value @ matrix(linear).T
        return y if linear.bias is None else y + linear.bias

    total = torch.zeros_like(x) if split.down_bias is None else split.down_bias.expand_as(x)
    for part in (split.heavy, split.light):
        if part is None:
            continue
        if part.gate_up is None and part.gate is None:
            hidden = nn.functional.gelu(product(part.up, x))
        else:
            if part.gate_up is None:
                gate, up = product(part.gate, x), product(part.up, x)
            else:
                gate, up = product(part.gate_up, x).chunk(2, -1)
            hidden = nn.functional.silu(gate) * up
        total = total + product(part.down, hidden)
    return total


def assert_close(found: torch.Tensor, expected: torch.Tensor, parts: str) -> None:
    """Equal, or within the rounding of int8 inputs.

    One scale for all of an input, whose largest element is k times its rms, gives an error of
    k / (127 * sqrt(12)) of it: 0.7 % for the normal inputs here (k = 3), 1.8 % for a product of two
    (k = 8), and the errors of gate and up add to that.
    """
    if "int8" in parts:
        assert (found - expected).norm() <= 0.03 * expected.norm()
    else:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_equals_the_sum_of_its_parts(parts: str, gated: bool, bias: bool) -> None:
    split, x = (
        made(parts, gated=gated, bias=bias),
        torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)),
    )
    assert_close(split(x), by_parts(split, x), parts)


@pytest.mark.matrix()
@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_compiles_as_one_graph(parts: str, gated: bool) -> None:
    split, x = made(parts, gated=gated), torch.randn(2, 5, 32)
    torch.compiler.reset()
    compiled = torch.compile(split, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), by_parts(split, x), parts)


@pytest.mark.parametrize("parts", PARTS)
def test_autocast_and_training_together(parts: str) -> None:
    """Every weight that is no integer gets a gradient, and so do the inputs."""
    split, x = made(parts, gated=True).train(), torch.randn(2, 5, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = split(x).float().square().sum()
    loss.backward()
    assert x.grad is not None and x.grad.any()
    assert all(value.grad is not None and value.grad.any() for value in split.parameters())


@torch.no_grad()
def test_a_dense_and_a_low_rank_part_take_their_products_and_nothing_else() -> None:
    """Six products and two activations: the sum over the parts and the bias are in the products."""
    split, x = made("dense and low rank", gated=False), torch.randn(4, 32)
    with torch.profiler.profile() as profile:
        split(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::addmm"] + counts.get("aten::mm", 0) == 6 and counts["aten::gelu"] == 2
    assert "aten::add" not in counts and "aten::add_" not in counts


@torch.no_grad()
@pytest.mark.parametrize(("parts", "products"), [("dense", 2), ("int8", 2), ("int8 and int4", 4)])
def test_gate_and_up_are_one_product(parts: str, products: int) -> None:
    split = made(parts, gated=True)
    split(torch.randn(4, 32))  # packs
    with torch.profiler.profile() as profile:
        split(torch.randn(4, 32))
    names = ("aten::addmm", "aten::mm", "onednn::qlinear_pointwise", "aten::_weight_int4pack_mm_for_cpu")
    assert sum(event.count for event in profile.key_averages() if event.key in names) == products


@torch.no_grad()
def test_int8_parts_make_their_input_integers_once() -> None:
    shape = FFNShape(num_neurons=96, hidden_size=32, gated=False, up_bias=False, down_bias=False)
    parts = (PartLayout(num_neurons=n, up=INT8, down=INT8) for n in (64, 32))
    split = SplitFFN(LayerLayout(heavy=next(parts), light=next(parts), down_bias=False), shape, nn.GELU())
    first = [*split.heavy.first_linears, *split.light.first_linears]
    assert len({id(each.inputs) for each in first}) == 1 and len(first) == 2
    assert split.heavy.down.inputs is not split.light.down.inputs
