"""Products of floating-point inputs with 4-bit weights, with one scale per group of input columns.

torch's kernels take nibbles from 0 to 15, which stand for -8 to 7, in their own order. They compute in
bfloat16, and inputs of other types are rounded to it. The CPU kernel is slow per row of inputs, so many rows
are multiplied by a bfloat16 matrix instead, which is unpacked again for every product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.compat.torch import int4_pack, int4_pack_cuda, int4_product
from ffsplit.ffn.quantization import pack_nibbles, unpack_nibbles

GROUP_SIZES = (256, 128, 64, 32)
CUDA_COLUMNS = 128
"""The CUDA kernel needs a multiple of this many columns; shorter matrices are zero-padded."""
UNPACKED_COLUMNS = 256
"""Columns of a packed matrix that are read back at a time."""
MANY_ROWS = 64
"""From this many rows of inputs on, unpacking the matrix to bfloat16 is worth it on the CPU."""
BLOCKS_AT_ONCE = 16
BLOCK = 64
"""Rows of a matrix that the CPU kernel interleaves if there is AVX-512."""


@dataclass(frozen=True)
class Packed:
    """A matrix in the kernel's form, and its scales in the kernel's form and as stored."""

    weight: Tensor
    scales: Tensor  # [groups, rows, (scale, zero)], bfloat16
    weight_scale: Tensor
    num_columns: int
    group_size: int

    def __call__(self, x: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if not rows.is_cuda and len(rows) >= MANY_ROWS and packs_by_blocks() and not len(self.weight) % BLOCK:
            y = self._by_matrix(rows)
        else:
            y = self._product(rows.contiguous(), self.scales)
        y = y.to(x.dtype)
        y = (y if bias is None else y + bias.to(x.dtype)).view(*x.shape[:-1], -1)
        return y if activation is None else activation(y)

    def _product(self, rows: Tensor, scales: Tensor) -> Tensor:
        missing = len(scales) * self.group_size - rows.shape[1] if rows.is_cuda else 0
        rows = functional.pad(rows, (0, missing)) if missing else rows
        return int4_product(rows, self.weight, scales, group_size=self.group_size)

    def _by_matrix(self, rows: Tensor) -> Tensor:
        """The product with the matrix in bfloat16, unpacked in pieces that fit into the cache."""
        weights = torch.split(self.weight, BLOCKS_AT_ONCE * BLOCK)
        scales = torch.split(self.scales[:, :, 0], BLOCKS_AT_ONCE * BLOCK, dim=1)
        return torch.cat(
            [rows @ self._matrix_KN(*piece) for piece in zip(weights, scales, strict=True)], dim=1
        )

    def _matrix_KN(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Some rows of the matrix, as [columns, rows] in bfloat16."""
        matrix_KN = unpacked_blocks(weight, self.num_columns).to(torch.bfloat16)
        groups = matrix_KN.view(len(scales), self.group_size, -1)
        groups.mul_(scales.contiguous()[:, None])  # with strided scales it takes twenty times as long
        return matrix_KN

    def takes(self, x: Tensor, *, compiling: bool) -> bool:
        """The CUDA kernel is for models in bfloat16. On the CPU, inputs may have any type."""
        return x.device == self.weight.device and (not x.is_cuda or x.dtype == torch.bfloat16)

    def tensors(self) -> dict[str, Tensor]:
        """The matrix [rows, columns / 2] and its scales as stored, read back through the kernel itself."""
        ones = torch.zeros_like(self.scales)
        ones[:, :, 0] = 1
        parts = []
        for start in range(0, self.num_columns, UNPACKED_COLUMNS):
            rows = ones.new_zeros(UNPACKED_COLUMNS, self.num_columns)
            rows.diagonal(start).fill_(1)
            parts.append(self._product(rows, ones))
        integers_NK = torch.cat(parts)[: self.num_columns].t().round().to(torch.int8)
        return {"weight": pack_nibbles(integers_NK).contiguous(), "weight_scale": self.weight_scale}


def unpacked_blocks(weight: Tensor, num_columns: int) -> Tensor:
    """The int8 matrix [columns, rows] of a packed one.

    The packed matrix has blocks of BLOCK rows: bytes [columns, BLOCK / 2], whose low nibbles are the first
    half of the rows.
    """
    packed = weight.view(-1, num_columns, BLOCK // 2).transpose(0, 1)
    integers = torch.empty(num_columns, packed.shape[1], BLOCK, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=integers[:, :, : BLOCK // 2])
    torch.bitwise_right_shift(packed, 4, out=integers[:, :, BLOCK // 2 :])
    return integers.view(torch.int8).sub_(8).view(num_columns, -1)


@cache
def packs_by_blocks() -> bool:
    """Whether `unpacked_blocks` inverts the CPU kernel's packing, which depends on the processor."""
    values = torch.arange(BLOCK * 32, dtype=torch.int32).mul(7).remainder(16).view(BLOCK, 32)
    packed = int4_pack(values)
    return torch.equal(unpacked_blocks(packed, 32), values.t() - 8)


def kernel_group_size(num_columns: int, group_size: int | None) -> int | None:
    """The largest group size that the kernels support and that divides the stored groups, or None."""
    whole = num_columns if group_size is None or group_size > num_columns else group_size
    fits = (size for size in GROUP_SIZES if whole % size == 0 and num_columns % size == 0)
    return next(fits, None)


def packs(num_rows: int, group_size: int | None, *, like: Tensor) -> bool:
    """Whether there is a kernel for this number of rows, this group size, and inputs like `like`."""
    if group_size is None:
        return False
    if like.is_cuda:
        return num_rows % 8 == 0 and like.dtype == torch.bfloat16
    return like.is_cpu and num_rows % 16 == 0


def pack(
    weight: Tensor, weight_scale: Tensor, *, stored_group_size: int | None, group_size: int, like: Tensor
) -> Packed:
    """Pack nibbles [rows, columns / 2] for inputs like `like`. `packs` must be true for them.

    Each stored group becomes several of `group_size` columns; the last stored group may be shorter.
    """
    num_columns = 2 * weight.shape[1]
    missing = -num_columns % CUDA_COLUMNS if like.is_cuda else 0
    values = functional.pad(unpack_nibbles(weight, num_columns).to(torch.int32), (0, missing)) + 8
    if like.is_cuda:  # the even column in the high nibble
        pairs = (values[:, 0::2] << 4 | values[:, 1::2]).to(torch.uint8)
        packed = int4_pack_cuda(pairs)
    else:
        packed = int4_pack(values)
    repeats = (stored_group_size or num_columns) // group_size
    scale = weight_scale.repeat_interleave(repeats, dim=1)[:, : num_columns // group_size]
    scale = functional.pad(scale, (0, missing // group_size))
    scales = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
    return Packed(packed, scales, weight_scale.clone(), num_columns, group_size)
