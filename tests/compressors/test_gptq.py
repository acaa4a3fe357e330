"""GPTQ against its definition, and what it must never do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffsplit.compressors.gptq import (
    BLOCK_COLUMNS,
    Rounded,
    gptq,
    moment_of,
    root_of_inverse,
    round_together,
    searched_scales,
)
from ffsplit.compressors.least_squares import second_moment
from ffsplit.ffn.quantization import integer_limits, quantize_rows, scales_of, spread_scales
from ffsplit.ffn.shapes import Integer

INT4, INT8 = Integer(num_bits=4, group_size=16), Integer(num_bits=8)
WIDE = 2 * BLOCK_COLUMNS + 40
"""More columns than two blocks, and not a whole number of groups."""


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def correlated(num_columns: int, *, seed: int = 3, num_tokens: int = 900) -> Tensor:
    mixing = normal(num_columns, num_columns, seed=seed) * torch.logspace(0, -1, num_columns)
    return normal(num_tokens, num_columns, seed=seed + 1) @ mixing.T


def on_grid(found: Rounded, format: Integer) -> Tensor:
    num_columns = found.integers.shape[1]
    return found.integers * spread_scales(found.scales, num_columns=num_columns, group_size=format.group_size)


def output_error(change: Tensor, moment: Tensor, *, ridge: float = 1e-2) -> float:
    ridged = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    return float((change.double() @ ridged * change.double()).sum())


@pytest.mark.parametrize("format", [INT4, INT8, Integer(num_bits=4), Integer(num_bits=8, group_size=24)])
def test_inputs_that_are_unrelated_are_rounded_to_nearest(format: Integer) -> None:
    weight = normal(9, WIDE)
    (found,) = round_together([(weight, format)], 7 * torch.eye(WIDE, dtype=torch.float64), ridge=1e-2)
    scale = spread_scales(found.scales, num_columns=WIDE, group_size=format.group_size)
    assert torch.equal(found.integers, (weight / scale).round().clamp(*integer_limits(format.num_bits)))


def test_blocks_give_what_one_column_at_a_time_gives() -> None:
    weight, moment = normal(5, WIDE).double(), second_moment([correlated(WIDE)])
    root, order = root_of_inverse(moment, ridge=1e-2), torch.arange(WIDE)
    scale = searched_scales(weight.float(), group_size=16, importance_K=torch.ones(WIDE)).double()
    scale_RK = scale.repeat_interleave(16, dim=1)[:, :WIDE]
    left, expected = weight.clone(), torch.empty_like(weight)
    for k in range(WIDE):
        expected[:, k] = (left[:, k] / scale_RK[:, k]).round().clamp(-8, 7)
        error = (left[:, k] - expected[:, k] * scale_RK[:, k]) / root[k, k]
        left[:, k + 1 :] -= torch.outer(error, root[k, k + 1 :])
    found = gptq(weight, scale_RK, limits=[(-8, 7)] * WIDE, order=order, root=root)
    assert torch.equal(found, expected)
    # any order gives the same as the columns in that order
    order = torch.randperm(WIDE, generator=torch.Generator().manual_seed(1))
    moved = gptq(
        weight[:, order.argsort()],
        scale_RK[:, order.argsort()],
        limits=[(-8, 7)] * WIDE,
        order=order,
        root=root,
    )
    assert torch.equal(moved[:, order], expected)


def test_the_root_is_that_of_the_inverse() -> None:
    moment = second_moment([correlated(40)])
    root = root_of_inverse(moment, ridge=1e-2)
    ridged = moment + 1e-2 * moment.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root @ ridged, torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize("format", [INT4, INT8, Integer(num_bits=4, group_size=64)])
@pytest.mark.parametrize("seed", range(6))
def test_calibrated_rounding_is_never_worse_than_rounding_to_nearest(format: Integer, seed: int) -> None:
    weight, moment = normal(12, WIDE, seed=seed), second_moment([correlated(WIDE, seed=seed)])
    (found,) = round_together([(weight, format)], moment, ridge=1e-2)
    error = output_error(on_grid(found, format) - weight, moment)
    scale = spread_scales(found.scales, num_columns=WIDE, group_size=format.group_size)
    nearest = (weight / scale).round().clamp(*integer_limits(format.num_bits)) * scale
    assert error < output_error(nearest - weight, moment)
    options = {"num_bits": format.num_bits, "group_size": format.group_size}
    plain = quantize_rows(weight, scales_of(weight, **options), **options)
    linear = on_grid(Rounded(_integers(plain["weight"], WIDE), plain["weight_scale"]), format)
    assert error < output_error(linear - weight, moment)


def _integers(stored: Tensor, num_columns: int) -> Tensor:
    from ffsplit.ffn.quantization import unpack_nibbles

    return (unpack_nibbles(stored, num_columns) if stored.dtype == torch.uint8 else stored).float()


def test_a_matrix_on_the_grid_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-7, 8, (6, 32), generator=generator).float()
    integers[:, ::16] = -8  # every group's largest magnitude
    scale = normal(6, 2).sign() * torch.exp2(torch.randint(-8, 3, (6, 2), generator=generator).float())
    weight = integers * scale.repeat_interleave(16, dim=1)
    (found,) = round_together([(weight, INT4)], second_moment([correlated(32)]), ridge=1e-2)
    assert torch.equal(on_grid(found, INT4), weight)
    assert torch.equal(found.integers, integers) and torch.equal(found.scales.float(), scale)


def test_searched_scales_beat_those_of_the_largest_magnitude() -> None:
    weight, importance = normal(20, 70), normal(70, seed=2).square()
    searched = searched_scales(weight, group_size=16, importance_K=importance)
    largest = scales_of(weight, num_bits=4, group_size=16)

    def errors(scales: Tensor) -> Tensor:
        scale = spread_scales(scales, num_columns=70, group_size=16)
        change = (weight / scale).round().clamp(-8, 7) * scale - weight
        return torch.stack([g.sum(1) for g in (change.square() * importance).split(16, dim=1)], dim=1)

    assert searched.dtype == torch.bfloat16 and searched.shape == (20, 5)
    assert bool((searched < 0).any()) and bool((searched > 0).any())
    assert errors(searched).sum() < 0.8 * errors(largest).sum()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.cat([torch.zeros(3, 16), normal(3, 16)], dim=1)
    (found,) = round_together([(weight, INT4)], 5 * torch.eye(32, dtype=torch.float64), ridge=1e-2)
    assert bool(found.scales.isfinite().all()) and bool((found.scales != 0).all())
    assert not on_grid(found, INT4)[:, :16].any()


def test_matrices_that_are_rounded_together_make_up_for_each_other() -> None:
    x_TK = correlated(64)
    light, heavy = normal(8, 48), normal(8, 16, seed=1)
    moment = second_moment([x_TK])
    together = round_together([(light, INT4), (heavy, INT8)], moment, ridge=1e-2)
    apart = [
        round_together([(light, INT4)], moment[:48, :48], ridge=1e-2)[0],
        round_together([(heavy, INT8)], moment[48:, 48:], ridge=1e-2)[0],
    ]
    weight = torch.cat([light, heavy], dim=1)
    errors = [
        output_error(torch.cat([on_grid(a, INT4), on_grid(b, INT8)], dim=1) - weight, moment)
        for a, b in (together, apart)
    ]
    assert errors[0] < 0.9 * errors[1]
    # the side on which a matrix stands is no difference
    swapped = round_together(
        [(heavy, INT8), (light, INT4)], second_moment([x_TK.roll(16, dims=1)]), ridge=1e-2
    )
    assert torch.equal(swapped[1].scales, together[0].scales)
    assert (swapped[1].integers != together[0].integers).float().mean() < 0.01


def test_moments_are_those_of_float64_within_the_rounding_of_products() -> None:
    chunks = [correlated(40, num_tokens=number) for number in (3, 1500)]
    exact, found = second_moment(chunks), moment_of(chunks)
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    size = exact.diagonal().sqrt()
    assert ((found - exact).abs() <= 1e-6 * torch.outer(size, size)).all()
