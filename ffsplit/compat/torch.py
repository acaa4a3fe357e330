"""Private operators of torch: products with integer weights. Known for 2.6 to 2.13.

Callers check whether this build and this machine have them (`runtime/integer_map.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def int4_pack(values: Tensor) -> Tensor:
    """Pack unsigned 4-bit values, as int32 [rows, columns], for `int4_product` on the CPU."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    return packed


def int4_pack_cuda(pairs: Tensor) -> Tensor:
    """Pack pairs of 4-bit values, as uint8 [rows, columns / 2], for `int4_product` on CUDA."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    return packed


def int4_product(rows: Tensor, packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """Rows [T, columns] times packed 4-bit weights, one scale and zero per group: [T, weight rows]."""
    y: Tensor
    if rows.is_cuda:
        y = torch.ops.aten._weight_int4pack_mm.default(rows, packed, group_size, scales)
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu.default(rows, packed, group_size, scales)
    return y


def int8_pack(weight: Tensor) -> Tensor:
    """Pack int8 weights [rows, columns] for `int8_product`."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def int8_product(
    integers: Tensor,
    step: float,
    zero_point: int,
    packed: Tensor,
    scale: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    *,
    post_op: tuple[str, str],
) -> Tensor:
    """Quantized inputs times packed int8 weights on the CPU, in float32, then `post_op` (name, algorithm)."""
    name, algorithm = post_op
    y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        integers, step, zero_point, packed, scale, zero_points, bias,
        1.0, 0, torch.float32, name, [], algorithm,
    )  # fmt: skip
    return y


def int8_product_plain(integers: Tensor, weight: Tensor) -> Tensor:
    """int8 [T, columns] times int8 [columns, rows], summed in int32; on CUDA for T above 16."""
    return torch._int_mm(integers, weight)
