"""Integer weights by the machine's kernels equal the same weights in floating point."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from ffsplit.ffn.quantization import quantize_rows, scales_of
from ffsplit.ffn.shapes import Integer
from ffsplit.runtime.kernels import int8 as int8_kernels
from ffsplit.runtime.kernels.int4 import MANY_ROWS, packs_by_blocks
from ffsplit.runtime.quantized_linear import QuantizedLinear, share_inputs, unpack

SHAPES = [(48, 64), (30, 33), (16, 128), (1, 8), (96, 256)]
HALF_STEP = 0.51 / 127
"""What rounding an input to 8 bits moves it by at most, as a part of the largest."""
BFLOAT16_STEP = 2.0**-9
"""What rounding a number to bfloat16 moves it by at most, as a part of it."""


def made(
    num_bits: Any, rows: int, columns: int, *, group_size: int | None = None, seed: int = 0, **options: Any
) -> QuantizedLinear:
    """A map with random weights, and biases unless `bias=False`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scale = scales_of(weight, num_bits=num_bits, group_size=group_size)
    tensors = quantize_rows(weight, scale, num_bits=num_bits, group_size=group_size)
    options = {"bias": True} | options
    result = QuantizedLinear(Integer(num_bits=num_bits, group_size=group_size), rows, columns, **options)
    result.hold(tensors)
    if result.bias is not None:
        result.bias.data = torch.randn(rows, generator=generator)
    return result.eval()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_within_rounding(found: Tensor, x: Tensor, linear: QuantizedLinear) -> None:
    """No further from the floating-point product than the inputs' rounding can move it."""
    weight = linear.float_weight(torch.float32)
    expected = functional.linear(x, weight, linear.bias)
    bound = HALF_STEP * x.abs().amax(-1, keepdim=True) * weight.abs().sum(1) + 1e-4
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.matrix(pairs=True)
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40,)])
def test_int8_is_within_the_rounding_of_its_inputs(
    rows: int, columns: int, bias: bool, shape: tuple[int, ...]
) -> None:
    linear, x = made(8, rows, columns, bias=bias), inputs(*shape, columns)
    found = linear(x)
    assert linear.is_packed and found.shape == (*shape, rows)
    assert_within_rounding(found, x, linear)


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("num_tokens", [2, 6, 300])
def test_what_a_token_gives_does_not_depend_on_its_neighbours(
    num_tokens: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a very large one, and however many are worked on at a time.

    To the bit, but for activations that torch computes by other instructions at the end of a tensor.
    """
    tolerance = {"rtol": 0.0, "atol": 0.0} if activation is None else {"rtol": 1e-5, "atol": 1e-7}
    linear, x = made(8, 48, 64), inputs(num_tokens, 64)
    linear.activation = None if activation is None else ACT2FN[activation]
    alone = torch.cat([linear(x[:2]), *(linear(x[i : i + 2]) for i in range(2, num_tokens, 2))])
    crowd = torch.cat([x, 1e4 * inputs(1, 64, seed=2)])
    torch.testing.assert_close(linear(crowd)[:num_tokens], alone, **tolerance)
    monkeypatch.setattr(int8_kernels, "INPUT_BLOCK", 5 * 64)
    monkeypatch.setattr(int8_kernels, "OUTPUT_BLOCK", 7 * 48)
    torch.testing.assert_close(linear(crowd)[:num_tokens], alone, **tolerance)
    one = torch.cat([linear(row) for row in x.split(1)])
    assert (one - alone).norm() <= 1e-3 * alone.norm()  # ties may go either way
    plain = linear._activated(linear._plain(crowd, linear.bias))[:num_tokens]
    assert (plain - alone).norm() <= 1e-3 * alone.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("num_tokens", [1, 2, 300])
def test_other_dtypes_are_converted_on_the_way(
    num_tokens: int, activation: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of tokens. The arithmetic is that of float32."""
    linear, x = made(8, 48, 64), inputs(num_tokens, 64).to(dtype)
    linear.activation = None if activation is None else ACT2FN[activation]
    expected = linear(x.float()).to(dtype)
    for block in (1 << 20, 5 * 64):
        monkeypatch.setattr(int8_kernels, "INPUT_BLOCK", block)
        monkeypatch.setattr(int8_kernels, "OUTPUT_BLOCK", block)
        found = linear(x.clone())
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@torch.no_grad()
def test_a_large_token_costs_the_others_nothing() -> None:
    x = inputs(6, 64)
    linear = made(8, 48, 64)
    assert_within_rounding(linear(torch.cat([x, 1000 * inputs(1, 64, seed=2)]))[:6], x, linear)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-30, 1e-13, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_inputs_of_any_size_become_integers(size: float, num_tokens: int) -> None:
    linear, x = made(8, 48, 64, bias=False), size * inputs(num_tokens, 64)
    expected = functional.linear(x, linear.float_weight(torch.float32))
    for found in (linear(x), linear._plain(x, None)):
        assert ((found - expected) / size).norm() <= 0.02 * (expected / size).norm()


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_int8_by_plain_operations_agrees_with_the_packed_kernel(num_tokens: int) -> None:
    """What is traced and what runs on CUDA."""
    linear, x = made(8, 48, 64), inputs(num_tokens, 64)
    found = linear._plain(x, linear.bias)
    assert_within_rounding(found, x, linear)
    torch.testing.assert_close(found, linear(x), atol=0.05, rtol=1e-3)  # ties may go either way


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_inputs_without_a_range(value: float) -> None:
    linear, x = made(8, 48, 64), torch.full((4, 64), value)
    for found in (linear(x), (linear.unpack(), linear._plain(x, linear.bias))[1]):
        assert_within_rounding(found, x, linear)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(value: float) -> None:
    x = inputs(4, 64)
    x[2, 5] = value
    linear = made(8, 48, 64)
    for found in (linear(x), (linear.unpack(), linear._plain(x, linear.bias))[1]):
        assert not found[2].isfinite().any()
        assert found[:2].isfinite().all() and found[3].isfinite().all()
    assert not linear(x[2:3]).isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "gelu_new"])
def test_an_activation_on_the_way_out(name: str) -> None:
    linear, x = made(8, 48, 64), inputs(5, 64)
    plain = linear(x)
    linear.activation = ACT2FN[name]
    torch.testing.assert_close(linear(x), ACT2FN[name](plain), atol=1e-4, rtol=1e-4)


@pytest.mark.matrix(pairs=True)
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 15, MANY_ROWS])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [
        *(
            (48, 64, 32),
            (128, 64, None),
            (64, 256, 64),
            (16, 96, 32),
            (30, 64, 32),
            (16, 33, 8),
            (16, 128, 48),
        ),
        *((128, 192, 128), (48, 96, 64)),  # the last group is shorter
    ],
)
def test_int4_equals_its_matrix(
    rows: int, columns: int, group_size: int | None, num_rows: int, dtype: torch.dtype
) -> None:
    """No further from it than bfloat16 moves inputs, scales, their product and the sum with the bias."""
    linear, x = made(4, rows, columns, group_size=group_size), inputs(num_rows, columns).to(dtype)
    found = linear(x)
    assert linear.is_packed == (rows % 16 == 0 and group_size in (32, 64, 128, None) and columns % 32 == 0)
    weight = linear.float_weight(torch.float32)
    expected = functional.linear(x.float(), weight, linear.bias)
    bound = 4 * BFLOAT16_STEP * functional.linear(x.float().abs(), weight.abs(), linear.bias.abs()) + 1e-4
    assert found.dtype == dtype and ((found.float() - expected).abs() <= bound).all()


def test_the_order_of_packed_nibbles_is_known_where_there_is_avx_512() -> None:
    """Then many rows are multiplied by a matrix that is made from them."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the order is another on this processor")
    assert packs_by_blocks()


@torch.no_grad()
@pytest.mark.parametrize(("num_bits", "group_size"), [(8, None), (8, 32), (4, 32), (4, None), (4, 128)])
def test_packing_is_undone_to_the_bit(num_bits: int, group_size: int | None) -> None:
    """In what is saved, copied and cast; and there is one copy at a time."""
    linear = made(num_bits, 48, 640, group_size=group_size)
    stored, x = linear.weight, inputs(2, 640)
    expected = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    assert expected.keys() == {"weight", "bias"}
    before = linear(x)
    assert (linear.weight is None) == linear.is_packed
    saved = linear.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    linear(x)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin.weight, stored) and torch.equal(twin(x), before)
    linear(x)
    assert torch.equal(linear.to("cpu").weight, stored)


@pytest.mark.parametrize("num_bits", [8, 4])
def test_compiles_without_a_break(num_bits: int) -> None:
    linear = made(num_bits, 48, 64)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for x in (inputs(4, 64), inputs(2, 9, 64)):
            assert_within_rounding(compiled(x), x, linear)


@pytest.mark.slow
@torch.inference_mode()
@torch._inductor.config.patch(freezing=True)
def test_frozen_graphs_multiply_integers_by_the_same_kernel() -> None:
    """One graph for all numbers of tokens; the weights are packed in it, for oneDNN."""
    torch.compiler.reset()
    linear = made(8, 48, 64).to(torch.bfloat16)
    linear.activation = ACT2FN["gelu"]
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    compiled(inputs(40, 64).to(torch.bfloat16))
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_tokens in (3, 17, 300):
            x = inputs(num_tokens, 64).to(torch.bfloat16)
            with torch.profiler.profile() as profile:
                found = compiled(x)
            assert "onednn::qlinear_pointwise" in {event.key for event in profile.key_averages()}
            expected = linear._activated(linear._plain(x, linear.bias))
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_packed_weights_say_how_to_compile_them() -> None:
    model = nn.Sequential(made(8, 48, 64))
    model(inputs(3, 64))
    with pytest.raises(Exception, match="unpack"):
        torch.compile(model, fullgraph=True, backend="eager")(inputs(3, 64))
    unpack(model)
    torch._dynamo.reset()
    assert torch.compile(model, fullgraph=True, backend="eager")(inputs(3, 64)).isfinite().all()


@pytest.mark.parametrize(("num_bits", "group_size"), [(8, None), (4, 32)])
def test_gradients_go_through_to_the_inputs(num_bits: int, group_size: int | None) -> None:
    linear, x = made(num_bits, 48, 64, group_size=group_size), inputs(3, 64).requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.float_weight(torch.float32).sum(0).expand(3, -1))
    assert linear.bias is not None and linear.bias.grad is not None


@torch.no_grad()
@pytest.mark.parametrize(("num_bits", "group_size"), [(8, None), (4, 32)])
def test_runs_under_autocast(num_bits: int, group_size: int | None) -> None:
    linear, x = made(num_bits, 48, 64, group_size=group_size), inputs(3, 64)
    expected = linear(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(linear(x.bfloat16()).float(), expected, atol=0.15, rtol=0.05)


@torch.inference_mode()
def test_maps_that_share_inputs_see_each_tensor_anew() -> None:
    """Also one that is changed in place, as far as torch knows of it, and one that is another's successor."""
    linears = [made(8, 48, 64, seed=seed) for seed in range(2)]
    alone = copy.deepcopy(linears)
    share_inputs(linears)
    assert linears[0].inputs is linears[1].inputs
    for seed in range(3):
        x = inputs(5, 64, seed=seed)
        for linear, twin in zip(linears, alone, strict=True):
            assert torch.equal(linear(x), twin(x))
        del x
    with torch.inference_mode(False), torch.no_grad():
        x = inputs(5, 64)
        linears[0](x)
        assert torch.equal(linears[1](x.mul_(2)), alone[1](x))
    assert copy.deepcopy(nn.ModuleList(linears))[0](x).shape == (5, 48)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_maps_packed_for_the_same_inputs_are_one_matrix(num_tokens: int) -> None:
    """As queries, keys and values are, but not what comes after attention."""
    options: dict[str, Any] = {"bias": False}
    linears = [made(8, rows, 64, seed=rows, **options) for rows in (64, 32, 48, 64)]
    stored = [linear.state_dict()["weight"].clone() for linear in linears]
    alone = copy.deepcopy(linears)
    share_inputs(linears)
    for seed in range(3):
        x, later = inputs(num_tokens, 64, seed=seed), inputs(num_tokens, 64, seed=seed + 9)
        for linear, twin, given in zip(linears, alone, (x, x, x, later), strict=True):
            expected = twin(given)
            assert torch.equal(linear(given), expected)
            linear(given).zero_()  # a part of the product that is asked for again is made again
            assert torch.equal(linear(given), expected)
        del x, later
    packed: list[Any] = [linear._packed for linear in linears]
    assert packed[0].product is packed[1].product is packed[2].product
    assert isinstance(packed[3], int8_kernels.Packed)
    x = inputs(num_tokens, 64)
    for linear, twin, weight in zip(linears, alone, stored, strict=True):
        assert torch.equal(linear.state_dict()["weight"], weight)
        assert torch.equal(linear(x), twin(x))


def test_inputs_that_are_gone_take_no_memory() -> None:
    linear, x = made(8, 48, 64), inputs(5, 64)
    with torch.no_grad():
        linear(x)
    held = weakref.ref(linear.inputs._last._mine.held[2].integers)
    assert held() is not None
    del x
    gc.collect()
    assert held() is None


def test_it_is_printed_with_its_sizes_and_its_format() -> None:
    linear = made(4, 48, 64, group_size=32)
    assert repr(linear) == "QuantizedLinear(64, 48, num_bits=4, group_size=32)"
