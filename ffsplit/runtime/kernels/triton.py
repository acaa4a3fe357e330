"""Kernels for NVIDIA GPUs in Triton's language, which comes with torch for CUDA."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def row_products(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, y, num_rows, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y[token, row] = scale[row] * sum(weight[row] * x[token]) + bias[row]: one program per element.

    Compiled for the number of columns, so that the loop is unrolled and a whole row is loaded at once.
    """
    row, token = tl.program_id(0), tl.program_id(1)
    weight += row.to(tl.int64) * COLUMNS
    x += token * COLUMNS
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if start + BLOCK <= COLUMNS:
            weights = tl.load(weight + columns, eviction_policy="evict_first")
            inputs = tl.load(x + columns)
        else:
            is_in = columns < COLUMNS
            weights = tl.load(weight + columns, mask=is_in, other=0, eviction_policy="evict_first")
            inputs = tl.load(x + columns, mask=is_in, other=0)
        sums += weights.to(tl.float32) * inputs.to(tl.float32)
    total = tl.sum(sums, 0) * tl.load(scale + row).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(y + token * num_rows + row, total.to(y.dtype.element_ty))
