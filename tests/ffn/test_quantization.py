"""Grids hold rows of any size: the error of a row is in proportion to the row."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ffsplit.ffn.quantization import dequantize, fake_quantize, joined, parted, quantize_rows, scales_of
from ffsplit.ffn.shapes import Integer
from ffsplit.runtime.quantized_linear import QuantizedLinear

GRIDS: list[tuple[Literal[4, 8], int | None]] = [(8, None), (8, 16), (4, None), (4, 32)]
NUM_COLUMNS = 64


def rows(exponents: list[float], *, seed: int, outlier: float = 1.0) -> Tensor:
    """Normal rows, each times a power of ten, the first element of each times `outlier`."""
    weight = torch.randn(len(exponents), NUM_COLUMNS, generator=torch.Generator().manual_seed(seed))
    weight[:, 0] *= outlier
    return (weight.double() * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]).float()


def on_grid(weight: Tensor, num_bits: int, group_size: int | None) -> Tensor:
    """As an artifact stores it and reads it back."""
    scale = scales_of(weight, num_bits=num_bits, group_size=group_size)
    stored = joined(quantize_rows(weight, scale, num_bits=num_bits, group_size=group_size))
    sizes = {"num_rows": len(weight), "num_groups": scale.shape[1], "num_columns": weight.shape[1]}
    return dequantize(
        parted(stored, num_bits=num_bits, **sizes), num_columns=weight.shape[1], group_size=group_size
    )


@pytest.mark.parametrize(("num_bits", "group_size"), GRIDS)
@given(
    exponents=st.lists(st.floats(-30, 30), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    outlier=st.sampled_from([1.0, 100.0, 1e5]),
)
def test_no_weight_moves_by_more_than_half_a_step_of_its_row(
    num_bits: int, group_size: int | None, exponents: list[float], seed: int, outlier: float
) -> None:
    weight = rows(exponents, seed=seed, outlier=outlier)
    found = on_grid(weight, num_bits, group_size).double()
    assert found.isfinite().all()
    size = group_size or NUM_COLUMNS
    largest = weight.double().abs().unflatten(1, (-1, size)).amax(2).repeat_interleave(size, dim=1)
    half_step = 0.5 * largest / (2 ** (num_bits - 1) - 1)
    assert ((found - weight.double()).abs() <= 1.005 * half_step).all()


@pytest.mark.parametrize(("num_bits", "group_size"), GRIDS)
@pytest.mark.parametrize("exponent", [-30.0, -12.0, -6.0, -3.0, 0.0, 6.0, 30.0])
def test_the_relative_error_does_not_depend_on_the_size_of_weights(
    num_bits: int, group_size: int | None, exponent: float
) -> None:
    """Weights of 1e-3 lost a factor of ten to scales that float16 could not hold."""
    errors = []
    for each in (exponent, 0.0):
        weight = rows([each] * 8, seed=0).double()
        found = on_grid(weight.float(), num_bits, group_size).double()
        errors.append(float((found - weight).norm() / weight.norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize(("num_bits", "group_size"), GRIDS)
def test_rows_of_zeros_and_of_denormal_numbers(num_bits: int, group_size: int | None) -> None:
    weight = rows([0.0, -40.0, 0.0], seed=0)
    weight[0] = 0
    found = on_grid(weight, num_bits, group_size)
    assert (found[0] == 0).all() and (found[1].abs() <= 1e-38).all()
    assert torch.equal(found[2:], on_grid(weight[2:], num_bits, group_size))


@pytest.mark.parametrize(("num_bits", "group_size"), GRIDS)
@given(exponents=st.lists(st.floats(-30, 30), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_a_matrix_on_its_grid_stays_as_it_is(
    num_bits: int, group_size: int | None, exponents: list[float], seed: int
) -> None:
    """So healing, which sees weights on the grid, sees what is published. The scales are the same too."""
    found = fake_quantize(rows(exponents, seed=seed), num_bits=num_bits, group_size=group_size)
    assert torch.equal(fake_quantize(found, num_bits=num_bits, group_size=group_size), found)
    assert torch.equal(on_grid(found, num_bits, group_size), found)


@torch.no_grad()
@pytest.mark.parametrize(("num_bits", "group_size"), [(8, None), (4, 32)])
@pytest.mark.parametrize("exponent", [-20.0, -6.0, -3.0, 6.0])
@pytest.mark.parametrize("num_tokens", [1, 5, 80])
def test_kernels_multiply_by_scales_of_any_size(
    num_bits: Literal[4, 8], group_size: int | None, exponent: float, num_tokens: int
) -> None:
    """Packed, by plain operations, and read back from the kernel's own form."""
    weight = rows([exponent] * 48, seed=0)
    scale = scales_of(weight, num_bits=num_bits, group_size=group_size)
    format = Integer(num_bits=num_bits, group_size=group_size)
    linear = QuantizedLinear(format, 48, NUM_COLUMNS, bias=False).eval()
    linear.hold(quantize_rows(weight, scale, num_bits=num_bits, group_size=group_size))
    stored = linear.state_dict()["weight"].clone()
    x = torch.randn(num_tokens, NUM_COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = functional.linear(x, linear.float_weight(torch.float32))
    for found in (linear(x), linear._plain(x, None)):
        assert (found - expected).norm() <= 0.02 * expected.norm()
    linear(x)
    assert linear.is_packed and torch.equal(linear.state_dict()["weight"], stored)


def test_float16_holds_what_scales_out_of_its_range_stand_for() -> None:
    weight = rows([-4.0], seed=0)
    scale = scales_of(weight, num_bits=8, group_size=None)
    assert float(scale) < torch.finfo(torch.float16).smallest_normal
    tensors = quantize_rows(weight, scale, num_bits=8, group_size=None)
    wide, narrow = (
        dequantize(tensors, num_columns=NUM_COLUMNS, group_size=None, dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    assert torch.equal(wide.half(), narrow)
