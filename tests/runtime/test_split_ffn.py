"""A split FFN runs as the sum of its parts, in one graph, under autocast and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ffsplit.ffn import Dense, FFNShape, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.runtime.integer_map import IntegerMap
from ffsplit.runtime.split_ffn import SplitFFN

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
    for tensor in split.state_dict(keep_vars=True).values():
        if tensor.dtype in (torch.int8, torch.uint8):
            low, high = (-127, 128) if tensor.dtype == torch.int8 else (0, 256)
            tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator))
        elif tensor.dtype == torch.float16:
            tensor.fill_(0.002)
        else:
            tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return split.eval()


def by_parts(split: SplitFFN, x: torch.Tensor) -> torch.Tensor:
    """The sum of its parts by matrices in floating point."""

    def matrix(linear: Any) -> torch.Tensor:
        if isinstance(linear, IntegerMap):
            return linear.float_weight(torch.float32)
        return linear.weight if hasattr(linear, "weight") else linear.left @ linear.right

    def product(linear: Any, value: torch.Tensor) -> torch.Tensor:
        y = value @ matrix(linear).T
        return y if linear.bias is None else y + linear.bias

    total = torch.zeros_like(x) if split.down_bias is None else split.down_bias.expand_as(x)
    for part in (split.heavy, split.light):
        if part is None:
            continue
        up = product(part.up, x)
        if part.gate is None:
            hidden = nn.functional.gelu(up)
        else:
            hidden = nn.functional.silu(product(part.gate, x)) * up
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
