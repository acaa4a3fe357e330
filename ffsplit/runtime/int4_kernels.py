"""Products of floating-point inputs with 4-bit weights, one scale a group of input columns.

torch's kernels take nibbles from 0 to 15, which stand for -8 to 7, in their own order; CUDA's computes in
bfloat16, the CPU's in the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffsplit.quantization import pack_nibbles, unpack_nibbles

GROUP_SIZES = (256, 128, 64, 32)
UNPACKED_COLUMNS = 256
"""Columns that are read back from a packed matrix at a time."""


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernel keeps it, and its scales [groups, rows, (scale, zero)] by input dtype."""

    weight: Tensor
    scales: dict[torch.dtype, Tensor]
    num_columns: int
    group_size: int

    def __call__(self, x: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.dtype not in self.scales:
            self.scales[rows.dtype] = next(iter(self.scales.values())).to(rows.dtype)
        y = self._product(rows, self.scales[rows.dtype])
        y = (y if bias is None else y + bias).view(*x.shape[:-1], -1)
        return y if activation is None else activation(y)

    def _product(self, rows: Tensor, scales: Tensor) -> Tensor:
        name = "_weight_int4pack_mm" if rows.is_cuda else "_weight_int4pack_mm_for_cpu"
        y: Tensor = getattr(torch.ops.aten, name)(rows, self.weight, self.group_size, scales)
        return y

    def takes(self, x: Tensor, *, compiling: bool) -> bool:
        """CUDA's kernel computes in bfloat16; the CPU's layout is as easily traced, but depends on it."""
        return x.device == self.weight.device and (not x.is_cuda or x.dtype == torch.bfloat16)

    def integers(self) -> Tensor:
        """The matrix [rows, columns / 2] as it was stored, read back through the kernel itself."""
        dtype = torch.bfloat16 if self.weight.is_cuda else torch.float32
        ones = torch.zeros_like(next(iter(self.scales.values())), dtype=dtype)
        ones[:, :, 0] = 1
        parts = []
        for start in range(0, self.num_columns, UNPACKED_COLUMNS):
            rows = torch.zeros(UNPACKED_COLUMNS, self.num_columns, dtype=dtype, device=ones.device)
            rows.diagonal(start).fill_(1)
            parts.append(self._product(rows, ones))
        integers_NK = torch.cat(parts)[: self.num_columns].t().round().to(torch.int8)
        return pack_nibbles(integers_NK).contiguous()


def kernel_group_size(num_columns: int, group_size: int | None) -> int | None:
    """The largest group that the kernels know and that the stored groups are made of; None for none."""
    whole = num_columns if group_size is None or group_size > num_columns else group_size
    fits = (size for size in GROUP_SIZES if whole % size == 0 and num_columns % size == 0)
    return next(fits, None)


def pack(weight: Tensor, weight_scale: Tensor, *, group_size: int | None, like: Tensor) -> Packed | None:
    """Pack nibbles [rows, columns / 2] for inputs like `like`; None where no kernel takes them."""
    num_rows, num_columns = weight.shape[0], 2 * weight.shape[1]
    step = 8 if like.is_cuda else 16
    if group_size is None or num_rows % step or like.device.type not in ("cpu", "cuda"):
        return None
    if like.is_cuda and (like.dtype != torch.bfloat16 or num_columns % 128):
        return None
    values = unpack_nibbles(weight, num_columns).to(torch.int32) + 8
    if like.is_cuda:  # the even column in the high half
        pairs = (values[:, 0::2] << 4 | values[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    scale = weight_scale.to(like.dtype)
    scale = scale.repeat_interleave(num_columns // group_size // scale.shape[1], dim=1)
    scales = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
    return Packed(packed, {like.dtype: scales}, num_columns, group_size)
