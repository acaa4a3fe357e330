"""Triton products with integer weights as this package stores them: candidates for its runtime on GPUs.

`products_gpu.py` times them beside libraries. `TRITON_INTERPRET=1 python benchmarks/products_triton.py`
compares them with torch, without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_MAX, INT8_MAX = 448.0, 127.0


@triton.jit  # type: ignore[untyped-decorator]
def _few_rows(  # type: ignore[no-untyped-def]
    x, weight, scale, parts, num_tokens, num_rows, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    NIBBLES: tl.constexpr, SPLITS: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A part of the columns of x [num_tokens, COLUMNS] times N rows of the weight, in float32.

    Weights take the type of x on the way. GROUP columns have one scale. A byte's low nibble is the even
    column.
    """
    PER_BYTE: tl.constexpr = 2 if NIBBLES else 1
    BYTES: tl.constexpr = COLUMNS // PER_BYTE
    SPAN: tl.constexpr = (BYTES + SPLITS * K - 1) // (SPLITS * K) * K
    rows, tokens = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, T)
    is_row, is_token = rows < num_rows, tokens < num_tokens
    sums = tl.zeros([T, N], tl.float32)
    for step in tl.range(0, SPAN, K):
        at = tl.program_id(1) * SPAN + step + tl.arange(0, K)
        is_in = at < BYTES
        where = rows[None, :].to(tl.int64) * BYTES + at[:, None]
        packed = tl.load(weight + where, mask=is_row[None, :] & is_in[:, None], other=0)
        inputs = x + tokens[:, None] * COLUMNS + PER_BYTE * at[None, :]
        mask = is_token[:, None] & is_in[None, :]
        if GROUP < COLUMNS:
            at_scale = rows[None, :] * (COLUMNS // GROUP) + (PER_BYTE * at // GROUP)[:, None]
            factor = tl.load(scale + at_scale, mask=is_row[None, :] & is_in[:, None], other=0).to(tl.float32)
        if NIBBLES:
            even = ((packed & 15).to(tl.int8) ^ 8) - 8
            odd = ((packed >> 4).to(tl.int8) ^ 8) - 8
            if GROUP < COLUMNS:
                even, odd = even.to(tl.float32) * factor, odd.to(tl.float32) * factor
            sums += tl.dot(tl.load(inputs, mask=mask, other=0), even.to(x.dtype.element_ty))
            sums += tl.dot(tl.load(inputs + 1, mask=mask, other=0), odd.to(x.dtype.element_ty))
        else:
            if GROUP < COLUMNS:
                packed = packed.to(tl.float32) * factor
            sums += tl.dot(tl.load(inputs, mask=mask, other=0), packed.to(x.dtype.element_ty))
    if GROUP >= COLUMNS:
        sums *= tl.load(scale + rows, mask=is_row, other=0).to(tl.float32)[None, :]
    at_part = (tl.program_id(1) * num_tokens + tokens[:, None]) * num_rows + rows[None, :]
    tl.store(parts + at_part, sums.to(parts.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


def few_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    tile: tuple[int, int, int],
    warps: int = 4,
    stages: int = 4,
) -> Tensor:
    """x [T <= 32, columns] times int8 [rows, columns] or nibbles [rows, columns / 2]: [T, rows].

    `weight_scale` is [rows, groups]. `tile`: rows of weights, bytes of columns, parts of the columns.
    """
    (num_tokens, columns), num_rows, (n, k, splits) = x.shape, len(weight), tile
    shape = (num_tokens, num_rows) if splits == 1 else (splits, num_tokens, num_rows)
    parts = x.new_empty(shape, dtype=x.dtype if splits == 1 else torch.float32)
    _few_rows[(triton.cdiv(num_rows, n), splits)](
        x, weight, weight_scale, parts, num_tokens, num_rows,
        COLUMNS=columns, GROUP=columns // weight_scale.shape[1],
        NIBBLES=weight.dtype == torch.uint8, SPLITS=splits, T=16 if num_tokens <= 16 else 32, N=n, K=k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return parts if splits == 1 else parts.sum(0).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded_rows(  # type: ignore[no-untyped-def]
    x, values, steps, COLUMNS: tl.constexpr, MOST: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of x in steps of its largest magnitude / MOST, and the step."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x_row = tl.load(x + row * COLUMNS + at, mask=at < COLUMNS, other=0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(x_row), 0) / MOST, 1.1754943508222875e-38)
    scaled = x_row * (1 / step)
    if ROUNDS:
        scaled = tl.floor(scaled + 0.5)
    tl.store(values + row * COLUMNS + at, scaled.to(values.dtype.element_ty), mask=at < COLUMNS)
    tl.store(steps + row, step)


def rounded_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs [T, columns] as int8 or float8_e4m3fn, and a step per token [T, 1], in one pass."""
    values = x.new_empty(x.shape, dtype=dtype)
    steps = x.new_empty(len(x), 1, dtype=torch.float32)
    is_int = dtype == torch.int8
    _rounded_rows[(len(x),)](
        x, values, steps, COLUMNS=x.shape[1], MOST=INT8_MAX if is_int else FP8_MAX, ROUNDS=is_int,
        BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8,
    )  # fmt: skip
    return values, steps


@triton.jit  # type: ignore[untyped-decorator]
def _many_rows(  # type: ignore[no-untyped-def]
    x, steps, weight, scale, y, num_tokens, num_rows, COLUMNS: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A tile of the product of integers, times the steps of its tokens and the scales of its rows.

    TOGETHER tiles of tokens are worked on for the same rows, which stay in the GPU's cache.
    """
    across, down = tl.cdiv(num_rows, N), tl.cdiv(num_tokens, T)
    group = tl.program_id(0) // (TOGETHER * across)
    high = tl.minimum(down - group * TOGETHER, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * across)
    tokens = (group * TOGETHER + within % high) * T + tl.arange(0, T)
    rows = within // high * N + tl.arange(0, N)
    x_at = x + (tokens % num_tokens)[:, None] * COLUMNS + tl.arange(0, K)[None, :]
    weight_at = weight + (rows % num_rows)[None, :].to(tl.int64) * COLUMNS + tl.arange(0, K)[:, None]
    sums = tl.zeros([T, N], tl.int32)
    for start in tl.range(0, COLUMNS, K):
        if COLUMNS % K == 0:
            sums = tl.dot(tl.load(x_at + start), tl.load(weight_at + start), sums, out_dtype=tl.int32)
        else:
            is_in = start + tl.arange(0, K) < COLUMNS
            x_tile = tl.load(x_at + start, mask=is_in[None, :], other=0)
            weight_tile = tl.load(weight_at + start, mask=is_in[:, None], other=0)
            sums = tl.dot(x_tile, weight_tile, sums, out_dtype=tl.int32)
    step = tl.load(steps + tokens, mask=tokens < num_tokens, other=0)
    factor = tl.load(scale + rows, mask=rows < num_rows, other=0).to(tl.float32)
    product = sums.to(tl.float32) * step[:, None] * factor[None, :]
    at = y + tokens[:, None].to(tl.int64) * num_rows + rows[None, :]
    is_in = (tokens < num_tokens)[:, None] & (rows < num_rows)[None, :]
    tl.store(at, product.to(y.dtype.element_ty), mask=is_in)


def many_rows(
    x: Tensor, weight: Tensor, weight_scale: Tensor, *, tile: tuple[int, int, int], warps: int = 8
) -> Tensor:
    """x [T, columns] times int8 [rows, columns] with a scale per row, integer by integer: [T, rows]."""
    values, steps = rounded_rows(x, torch.int8)
    (num_tokens, columns), num_rows, (t, n, k) = x.shape, len(weight), tile
    y = x.new_empty(num_tokens, num_rows)
    _many_rows[(triton.cdiv(num_tokens, t) * triton.cdiv(num_rows, n),)](
        values, steps, weight, weight_scale, y, num_tokens, num_rows,
        COLUMNS=columns, T=t, N=n, K=k, TOGETHER=8,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _as_fp8(  # type: ignore[no-untyped-def]
    weight, scale, values, steps, COLUMNS: tl.constexpr, GROUP: tl.constexpr, NIBBLES: tl.constexpr,
    LARGEST: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of integers as fp8 in steps of the row: its largest scale times LARGEST becomes 448."""
    PER_BYTE: tl.constexpr = 2 if NIBBLES else 1
    NUM_GROUPS: tl.constexpr = COLUMNS // GROUP
    row, groups = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    scales = tl.load(scale + row * NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(scales), 0) * LARGEST / 448.0, 1.1754943508222875e-38)
    for start in tl.range(0, COLUMNS // PER_BYTE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_in = at < COLUMNS // PER_BYTE
        packed = tl.load(weight + row * (COLUMNS // PER_BYTE) + at, mask=is_in, other=0)
        at_scale = scale + row * NUM_GROUPS + PER_BYTE * at // GROUP
        factor = tl.load(at_scale, mask=is_in, other=0).to(tl.float32) * (1 / step)
        if NIBBLES:
            even = (((packed & 15).to(tl.int8) ^ 8) - 8).to(tl.float32) * factor
            odd = (((packed >> 4).to(tl.int8) ^ 8) - 8).to(tl.float32) * factor
            both, columns = tl.interleave(even, odd), 2 * start + tl.arange(0, 2 * BLOCK)
            tl.store(
                values + row * COLUMNS + columns, both.to(values.dtype.element_ty), mask=columns < COLUMNS
            )
        else:
            found = packed.to(tl.float32) * factor
            tl.store(values + row * COLUMNS + at, found.to(values.dtype.element_ty), mask=is_in)
    tl.store(steps + row, step)


def as_fp8(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Integers or nibbles with scales [rows, groups] as float8_e4m3fn [rows, columns], and a step per row."""
    is_nibbles = weight.dtype == torch.uint8
    num_rows, columns = len(weight), weight.shape[1] * (2 if is_nibbles else 1)
    values = torch.empty(num_rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    steps = torch.empty(num_rows, 1, device=weight.device)
    _as_fp8[(num_rows,)](
        weight, weight_scale, values, steps,
        COLUMNS=columns, GROUP=columns // weight_scale.shape[1], NIBBLES=is_nibbles,
        LARGEST=8 if is_nibbles else 127, GROUPS=triton.next_power_of_2(weight_scale.shape[1]), BLOCK=1024,
    )  # fmt: skip
    return values, steps


def by_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x [T, columns] times integers that become fp8 for every product, by torch._scaled_mm."""
    values, steps = as_fp8(weight, weight_scale)
    rows, row_steps = rounded_rows(x, torch.float8_e4m3fn)
    return torch._scaled_mm(rows, values.t(), row_steps, steps.t(), out_dtype=x.dtype)


def compared() -> None:
    """Print each kernel's relative error: of few rows 0.0002, of integers 0.007, of fp8 0.04.

    In float16, since Triton's interpreter has no products of bfloat16. It also truncates fp8, which makes
    that error 0.08.
    """
    from ffsplit.ffn.quantization import dequantize, quantize_rows, scales_of

    options: Any
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(80, 192, device=device)
    for options in (
        {"num_bits": 8, "group_size": None},
        {"num_bits": 4, "group_size": 32},
        {"num_bits": 4, "group_size": 64},
    ):
        stored = quantize_rows(weight, scales_of(weight, **options), **options)
        exact = dequantize(stored, num_columns=192, group_size=options["group_size"])
        pair = stored["weight"], stored["weight_scale"]
        x = torch.randn(20, 192, device=device, dtype=torch.float16)
        found = {
            "few rows": few_rows(x, *pair, tile=(32, 64, 1)),
            "split": few_rows(x, *pair, tile=(32, 32, 2)),
        }
        values, steps = as_fp8(*pair)
        rows, row_steps = rounded_rows(x, torch.float8_e4m3fn)
        found["fp8"] = (rows.float() * row_steps) @ (values.float() * steps).T
        if options["num_bits"] == 8:
            found["integers"] = many_rows(x, *pair, tile=(16, 32, 64), warps=4)
        for name, y in found.items():
            expected = x.float() @ exact.T
            print(options, name, float((y.float() - expected).norm() / expected.norm()))


if __name__ == "__main__":
    compared()
