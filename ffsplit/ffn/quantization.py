"""Integer grids: matrices as int8, or as two 4-bit integers per byte, with bfloat16 scales.

Names follow compressed-tensors: `weight` [rows, columns] or packed, `weight_scale` [rows, groups].
Grids are symmetric, so there are no zero points. A 4-bit grid may reach to -8, and its scale may be negative:
then a group's largest magnitude takes the 16th integer, whatever its sign.

A scale needs range, not precision: weights are rounded to the grid of the stored scale, so a coarse scale
costs nothing. bfloat16 has the range of float32 in two bytes. float16 ends at 6e-5, where rows of small
weights would lose bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16


def integer_limits(num_bits: int) -> tuple[int, int]:
    """The lowest and the highest integer: all 16 of 4 bits; with 8 bits as many on both sides of 0."""
    return (-8, 7) if num_bits == 4 else (-127, 127)


def scales_of(weight: Tensor, *, num_bits: int, group_size: int | None) -> Tensor:
    """The scale of each row's groups of `group_size` columns (None: all), [rows, groups] bfloat16.

    The largest magnitude of a group maps to the largest integer, so no weight moves by more than half a
    step, and a matrix that is already on a grid gets that grid's scales. A group whose largest magnitude is
    below 1.5e-36 keeps fewer bits, because its scale would be a denormal number.
    """
    num_columns = weight.shape[1]
    size = num_columns if group_size is None else min(group_size, num_columns)
    groups = torch.split(weight, size, dim=1)
    largest = torch.stack([group.abs().amax(dim=1) for group in groups], dim=1)
    smallest = torch.finfo(SCALE_DTYPE).smallest_normal
    scale: Tensor = (largest.float() / (2 ** (num_bits - 1) - 1)).clamp(min=smallest)
    return scale.to(SCALE_DTYPE)


def quantize_rows(
    weight: Tensor, weight_scale: Tensor, *, num_bits: int, group_size: int | None
) -> dict[str, Tensor]:
    """Round a matrix [rows, columns] to the grid of its scales [rows, groups].

    Returns them as `stored_integers` does.
    """
    limit = 2 ** (num_bits - 1) - 1
    scale = spread_scales(weight_scale, num_columns=weight.shape[1], group_size=group_size)
    integers = (weight.float() / scale).round().clamp(-limit, limit)
    return stored_integers(integers, weight_scale, num_bits=num_bits)


def stored_integers(integers: Tensor, weight_scale: Tensor, *, num_bits: int) -> dict[str, Tensor]:
    """A matrix of integers [rows, columns] in any type, and its scales [rows, groups], as they are stored.

    Returns `weight`, int8, or uint8 with two values per byte for 4 bits, and `weight_scale`.
    """
    narrow = integers.to(torch.int8)
    return {"weight": pack_nibbles(narrow) if num_bits == 4 else narrow, "weight_scale": weight_scale}


def dequantize(
    tensors: Mapping[str, Tensor],
    *,
    num_columns: int,
    group_size: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix [rows, columns] on the grid, in floating point.

    Scales may exceed float16's range even if the weights do not, so float16 is multiplied in float32.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    integers = unpack_nibbles(weight, num_columns) if weight.dtype == torch.uint8 else weight
    wide = torch.float32 if dtype == torch.float16 else dtype
    return (
        integers.to(wide) * spread_scales(scale, num_columns=num_columns, group_size=group_size).to(wide)
    ).to(dtype)


def fake_quantize(weight: Tensor, *, num_bits: int, group_size: int | None) -> Tensor:
    """The matrix as it will be once quantized; gradients pass straight through."""
    with torch.no_grad():
        scale = scales_of(weight, num_bits=num_bits, group_size=group_size)
        tensors = quantize_rows(weight, scale, num_bits=num_bits, group_size=group_size)
        on_grid = dequantize(tensors, num_columns=weight.shape[1], group_size=group_size, dtype=weight.dtype)
        change = on_grid - weight
    return weight + change


def spread_scales(weight_scale: Tensor, *, num_columns: int, group_size: int | None) -> Tensor:
    """One scale per column, float32; a single scale per row is left to broadcast."""
    if group_size is None or weight_scale.shape[1] == 1:
        return weight_scale.float()
    return weight_scale.float().repeat_interleave(group_size, dim=1)[:, :num_columns]


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """A matrix as one tensor of an even number of bytes: the scales, then the integers.

    So a checkpoint has one tensor per matrix, and none that could be mistaken for the original's.
    """
    scales, integers = (tensors[name].contiguous().view(torch.uint8) for name in ("weight_scale", "weight"))
    size = scales.numel() + integers.numel()
    return torch.cat([scales.flatten(), integers.flatten(), scales.new_zeros(size % 2)])


def parted(
    stored: Tensor, *, num_bits: int, num_rows: int, num_groups: int, num_columns: int
) -> dict[str, Tensor]:
    """Undo `joined`: views of `weight` and `weight_scale`, as `quantize_rows` returns them."""
    split = 2 * num_rows * num_groups
    width, dtype = (num_columns, torch.int8) if num_bits == 8 else (-(-num_columns // 2), torch.uint8)
    integers = stored[split : split + num_rows * width].view(dtype).view(num_rows, width)
    return {"weight": integers, "weight_scale": stored[:split].view(SCALE_DTYPE).view(num_rows, num_groups)}


def pack_nibbles(integers: Tensor) -> Tensor:
    """Two's-complement nibbles, the even column in the low half; an odd last column gets a zero."""
    if integers.shape[1] % 2:
        integers = torch.nn.functional.pad(integers, (0, 1))
    nibbles = (integers & 0xF).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, num_columns: int) -> Tensor:
    """The int8 matrix that `pack_nibbles` packed."""
    low, high = packed & 0xF, packed >> 4
    nibbles = torch.stack([low, high], dim=2).flatten(1)[:, :num_columns].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
