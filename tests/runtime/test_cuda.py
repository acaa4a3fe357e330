"""The GPU's kernels compute what the same operations give elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.ffn.quantization import quantize_rows, scales_of
from ffsplit.ffn.shapes import FFNShape, Integer, LayerLayout, PartLayout
from ffsplit.runtime.kernels import int8_gemv_cuda
from ffsplit.runtime.modules import SplitFFN
from ffsplit.runtime.quantized_linear import QuantizedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BFLOAT16 = {"atol": 0.02, "rtol": 0.02}


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    """torch.compile refuses a ninth shape of one function."""
    torch.compiler.reset()


def made(
    num_bits: Any, rows: int, columns: int, *, group_size: int | None = None, size: float = 1.0
) -> QuantizedLinear:
    """A map on the GPU whose outputs are about `size`."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * size / columns**0.5
    scale = scales_of(weight, num_bits=num_bits, group_size=group_size)
    result = QuantizedLinear(Integer(num_bits=num_bits, group_size=group_size), rows, columns, bias=True)
    result.hold(quantize_rows(weight, scale, num_bits=num_bits, group_size=group_size))
    result.bias.data.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    return result.eval().cuda()


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)


def plain_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What the kernel for a few rows computes, by torch's operations."""
    y = functional.linear(x.float(), weight.float()) * scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def expected(linear: QuantizedLinear, x: Tensor) -> Tensor:
    weight = copy.deepcopy(linear).float_weight(torch.float32)
    return functional.linear(x.float(), weight, linear.bias.float())  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (30, 33), (1, 8), (1088, 768), (96, 2752)])
@pytest.mark.parametrize("num_tokens", [1, 3, int8_gemv_cuda.MOST_ROWS])
@pytest.mark.parametrize("has_bias", [True, False])
def test_few_rows_equal_the_plain_product(
    dtype: torch.dtype, rows: int, columns: int, num_tokens: int, has_bias: bool
) -> None:
    linear, x = made(8, rows, columns), inputs(num_tokens, columns, dtype=dtype)
    weight, scale = linear.tensors().values()
    bias = linear.bias if has_bias else None
    assert int8_gemv_cuda.takes(x, weight)
    arguments = (x, weight, scale[:, 0].contiguous(), bias)
    found, plain = int8_gemv_cuda.product(*arguments), plain_product(*arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(found, plain, atol=1e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 300])
def test_int8_weights_out_of_a_compiled_model_cost_their_rounding_alone(num_tokens: int) -> None:
    linear, x = made(8, 1088, 768), inputs(2, num_tokens, 768)
    torch.testing.assert_close(linear(x).float(), expected(linear, x), **BFLOAT16)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_int8_products_compile_in_one_graph(num_tokens: int) -> None:
    linear, x = made(8, 1088, 768), inputs(num_tokens, 768)
    found = torch.compile(linear, fullgraph=True)(x).float()
    bound = 0.02 if num_tokens == 1 else 0.08  # many rows become integers too
    torch.testing.assert_close(found, expected(linear, x), atol=bound, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("columns", [128, 192, 2752])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_4_bit_weights_by_the_kernel_for_them(columns: int, group_size: int, num_tokens: int) -> None:
    linear, x = made(4, 96, columns, group_size=group_size), inputs(num_tokens, columns)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    found = linear(x).float()
    assert linear.is_packed
    torch.testing.assert_close(found, expected(linear, x), atol=0.03, rtol=0.03)
    compiled = torch.compile(linear, fullgraph=True)(x).float()
    torch.testing.assert_close(compiled, found, **BFLOAT16)
    after = linear.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("light", [Integer(num_bits=4, group_size=64), Integer(num_bits=8)])
def test_a_gated_split_ffn_on_the_gpu_computes_what_it_computes_on_the_cpu(light: Integer) -> None:
    layout = LayerLayout(heavy=_part(64, Integer(num_bits=8)), light=_part(192, light), down_bias=False)
    shape = FFNShape(num_neurons=256, hidden_size=128, gated=True, up_bias=False, down_bias=False)
    ffn = SplitFFN(layout, shape, torch.nn.SiLU()).eval()
    generator = torch.Generator().manual_seed(0)
    for module in ffn.modules():
        if isinstance(module, QuantizedLinear):
            weight = torch.randn(module.num_rows, module.num_columns, generator=generator) / 16
            options = {"num_bits": module.num_bits, "group_size": module.group_size}
            module.hold(quantize_rows(weight, scales_of(weight, **options), **options))
    x = torch.randn(40, 128, generator=generator)
    x.requires_grad_()
    exact = ffn(x)
    exact.square().sum().backward()
    gradient, exact = x.grad, exact.detach()
    on_gpu = copy.deepcopy(ffn).cuda()
    y = x.detach().cuda().requires_grad_()
    on_gpu(y).square().sum().backward()
    assert gradient is not None and y.grad is not None
    torch.testing.assert_close(y.grad.cpu(), gradient, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        for count in (1, 40):
            found = on_gpu(y.detach()[:count].bfloat16()).float().cpu()
            torch.testing.assert_close(found, exact[:count], atol=0.1, rtol=0.05)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                cast = on_gpu(y.detach()[:count]).float().cpu()
            torch.testing.assert_close(cast, exact[:count], atol=0.1, rtol=0.05)


def _part(num_neurons: int, format: Integer) -> PartLayout:
    return PartLayout(num_neurons=num_neurons, up=format, gate=format, down=format)


@torch.no_grad()
def test_what_a_token_gives_does_not_depend_on_its_neighbours() -> None:
    """With one scale for all, a token a thousand times larger would leave nothing of the others."""
    linear, x = made(8, 1088, 768), inputs(40, 768)
    crowd = torch.cat([x, 1000 * inputs(1, 768)])
    for run in (linear, torch.compile(linear, fullgraph=True)):
        torch.testing.assert_close(run(crowd)[:40].float(), expected(linear, x), atol=0.08, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize(("num_bits", "group_size"), [(8, None), (4, 32)])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_weights_of_any_size(num_bits: int, group_size: int | None, size: float, num_tokens: int) -> None:
    """Whose scales float16 could not hold."""
    linear, x = made(num_bits, 96, 128, group_size=group_size, size=size), inputs(num_tokens, 128)
    linear.bias.data.zero_()  # type: ignore[union-attr]
    for run in (linear, torch.compile(linear, fullgraph=True)):
        difference = run(x).float() - expected(linear, x)
        assert difference.norm() <= 0.03 * expected(linear, x).norm()
