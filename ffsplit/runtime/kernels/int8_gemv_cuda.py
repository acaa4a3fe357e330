"""A few rows of inputs times an int8 matrix on CUDA, in one kernel that reads each weight once.

Such a product is limited by reading its weights, so inputs stay in floating point. torch's own kernel for it,
`_weight_int8pack_mm`, reads 0.1 to 0.2 TB/s on an H100, this one 1.6 to 2.5 (benchmarks/speed-notes.md).
"""

from __future__ import annotations

from torch import Tensor

try:
    from ffsplit.runtime.kernels.triton import row_products
except ImportError:  # a torch without CUDA comes without Triton
    row_products = None

MOST_ROWS = 8
"""Each row reads the matrix again, from the GPU's cache. With more rows a matrix product is faster."""
BLOCK, WARPS = 2048, 4
"""The fastest of the values timed over several shapes (benchmarks/speed-notes.md)."""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes these: inputs [..., columns] and int8 [rows, columns] on one CUDA device."""
    is_few = x.is_cuda and x.numel() <= MOST_ROWS * x.shape[-1]
    return is_few and weight.device == x.device and row_products is not None


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (scale * weight)^T + bias in x's dtype. `scale` [rows] has one number per row of the weight."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (num_rows, num_columns), num_tokens = weight.shape, rows.shape[0]
    y = x.new_empty(num_tokens, num_rows)
    row_products[(num_rows, num_tokens)](
        rows, weight, scale, rows if bias is None else bias, y, num_rows, num_columns,
        HAS_BIAS=bias is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y.view(*x.shape[:-1], num_rows)
