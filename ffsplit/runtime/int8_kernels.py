"""Products with int8 weights, one scale an output row, and inputs that become integers on the way.

Inputs are asymmetric: x is about (q - zero) * scale with q of 8 bits, zero exact in its range. On the CPU
oneDNN multiplies unsigned inputs by signed weights (VNNI where the processor has it).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

SMALLEST_CUDA_ROWS = 17
"""cuBLAS multiplies int8 matrices of more than 16 rows."""

MANY = 16384
"""Values from which on two conversions that are vectorized take less time than one that is not."""
T = TypeVar("T")
NO_OP = ("none", "none")
POST_OPS = {
    "GELUActivation": ("gelu", "none"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", "none"),
}
"""Activation modules that oneDNN applies to the products on their way out."""


class Inputs(NamedTuple):
    """Inputs as bytes [T, columns]: x is about (byte - zero) * scale, and times a token's own scale."""

    integers: Tensor
    scale: float
    zero: int
    scale_T1: Tensor | None


class LastOf(Generic[T]):
    """What was made of a tensor last, for as long as that lives and is not changed."""

    def __init__(self) -> None:
        self._held: tuple[Callable[[], Tensor | None], int, T] | None = None

    def get(self, x: Tensor) -> T | None:
        held = self._held
        return held[2] if held is not None and held[0]() is x and held[1] == _version(x) else None

    def keep(self, x: Tensor, made: T) -> T:
        self._held = weakref.ref(x, self._forget), _version(x), made
        return made

    def _forget(self, _: Any) -> None:
        self._held = None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class SharedInputs:
    """Makes inputs integers once for several maps that are given the same tensor one after the other."""

    def __init__(self) -> None:
        self._last: LastOf[Inputs] = LastOf()
        self.packed_for: LastOf[list[Any]] = LastOf()
        """The maps that were packed when they were given a tensor."""

    def of(self, x: Tensor, *, per_token: bool) -> Inputs:
        inputs = self._last.get(x)
        if inputs is not None:
            return inputs
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.dtype == torch.float32 else rows.float()
        inputs = _as_bytes_by_token(rows) if per_token and rows.shape[0] > 1 else _as_bytes(rows)
        return self._last.keep(x, inputs)

    def __reduce__(self) -> Any:
        """A copy of a model shares inputs among its own maps."""
        return SharedInputs, ()


@dataclass(frozen=True)
class Packed:
    """A matrix as oneDNN keeps it, and its scales. Calls take and give any floating-point dtype."""

    weight: Tensor
    scale: Tensor
    zero_points: Tensor
    per_token: bool
    inputs: SharedInputs

    def __call__(self, x: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
        bias = bias if bias is None or bias.dtype == torch.float32 else bias.float()
        inputs = self.inputs.of(x, per_token=self.per_token)
        post_op = None if activation is None else POST_OPS.get(type(activation).__name__)
        if inputs.scale_T1 is None:
            y = self._product(inputs, bias, post_op=post_op or NO_OP)
        else:
            y, post_op = self._product(inputs, None), None
            scale_T1 = inputs.scale_T1
            y = y.mul_(scale_T1) if bias is None else torch.addcmul(bias, y, scale_T1)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if activation is None or post_op is not None else activation(y)

    def _product(self, inputs: Inputs, bias: Tensor | None, *, post_op: tuple[str, str] = NO_OP) -> Tensor:
        name, algorithm = post_op
        y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            inputs.integers, inputs.scale, inputs.zero, self.weight, self.scale, self.zero_points, bias,
            1.0, 0, torch.float32, name, [], algorithm,
        )  # fmt: skip
        return y

    def takes(self, x: Tensor, *, compiling: bool) -> bool:
        """oneDNN's own layout cannot be traced."""
        return x.is_cpu and not compiling

    def tensors(self) -> dict[str, Tensor]:
        """The matrix [rows, columns] and its scales [rows, 1] as they were stored."""
        return {"weight": self.weight.to_dense().t().contiguous(), "weight_scale": self.scale.half()[:, None]}


class SharedProduct:
    """The product of one tensor with a matrix that several maps have their rows in."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self._last: LastOf[tuple[Tensor, set[int]]] = LastOf()

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Some columns of the product. Each are given out once, as they may be changed in place."""
        y, given = self._last.get(x) or (None, set())
        if y is None or start in given:
            y, given = self._last.keep(x, (self.packed(x, None), set()))
        given.add(start)
        return y[..., start:stop]


@dataclass(frozen=True)
class PackedRows:
    """One map's rows of a matrix that is packed as a whole."""

    product: SharedProduct
    start: int
    stop: int

    def __call__(self, x: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
        y = self.product.columns(x, self.start, self.stop)
        y = y if bias is None else y + bias.to(y.dtype)
        return y if activation is None else activation(y)

    def takes(self, x: Tensor, *, compiling: bool) -> bool:
        return self.product.packed.takes(x, compiling=compiling)

    def tensors(self) -> dict[str, Tensor]:
        whole = self.product.packed.tensors()
        return {name: tensor[self.start : self.stop].clone() for name, tensor in whole.items()}


def together(packed: Sequence[Packed | PackedRows]) -> list[PackedRows]:
    """Matrices of maps that are given the same inputs, packed as one."""
    stored = [each.tensors() for each in packed]
    weight, scale = (torch.cat([each[name] for each in stored]) for name in ("weight", "weight_scale"))
    first = packed[0] if isinstance(packed[0], Packed) else packed[0].product.packed
    whole = pack(weight, scale, per_token=first.per_token, inputs=SharedInputs())
    assert whole is not None
    stops = list(accumulate(len(each["weight"]) for each in stored))
    product = SharedProduct(whole)
    return [PackedRows(product, *pair) for pair in zip([0, *stops], stops, strict=False)]


def _as_bytes(rows: Tensor) -> Inputs:
    """A matrix as bytes with one scale and zero point.

    254 steps from the lowest value to the highest, so that rounding the zero point needs no clamp; adding
    a half and cutting off rounds.
    """
    lowest, highest = rows.aminmax()
    low, high = min(lowest.item(), 0.0), max(highest.item(), 0.0)
    scale = max(high - low, 1e-12) / 254
    if not math.isfinite(scale):
        return Inputs(torch.zeros_like(rows, dtype=torch.uint8), math.nan, 1, None)
    zero = round(-low / scale)
    return Inputs(_bytes(torch.rsub(rows, zero + 0.5, alpha=-1 / scale)), scale, zero, None)


def _as_bytes_by_token(rows: Tensor) -> Inputs:
    """Each token has a scale of its own; its zero point is 128."""
    scale_T1 = (rows.abs().amax(1, keepdim=True) / 127).clamp_(min=1e-12)
    return Inputs(_bytes(rows.div(scale_T1).add_(128.5)), 1.0, 128, scale_T1)


def _bytes(values: Tensor) -> Tensor:
    """Values of 0 up to 255.9, cut off: many by way of 16 bits, which torch has vector instructions for."""
    return values.to(torch.uint8) if values.numel() < MANY else values.to(torch.int16).to(torch.uint8)


def pack(weight: Tensor, weight_scale: Tensor, *, per_token: bool, inputs: SharedInputs) -> Packed | None:
    """Pack a matrix [rows, columns] of int8; None away from the CPU, or where torch lacks the kernel."""
    if weight.device.type != "cpu" or "onednn" not in torch.backends.quantized.supported_engines:
        return None
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero_points = torch.zeros(len(weight), dtype=torch.long)
    return Packed(packed, weight_scale[:, 0].float().contiguous(), zero_points, per_token, inputs)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `matmul` takes these: on the CPU anything, on CUDA sizes that cuBLAS knows, compiled."""
    if x.device.type == "cuda":
        return torch.compiler.is_compiling() and weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0
    return x.device.type == "cpu"


def matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, per_token: bool) -> Tensor:
    """The product by plain operations, which torch.compile fuses around one integer GEMM.

    A row of ones below the inputs gives the sums of the weight's rows, which zero points are taken off
    with; more of them make up the rows that cuBLAS asks for.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    num_tokens = rows.shape[0]
    low, high = (rows.amin(1, True), rows.amax(1, True)) if per_token else (rows.amin(), rows.amax())
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low).clamp(min=1e-12) / 254  # as in `_as_bytes`
    zero = (-low / step).round() - 128
    integers = (rows / step + (zero + 0.5)).floor().to(torch.int8)
    ones = integers.new_ones(max(1, SMALLEST_CUDA_ROWS - num_tokens), rows.shape[1])
    product = torch._int_mm(torch.cat([integers, ones]), weight.t()).float()
    y = (product[:num_tokens] - zero * product[num_tokens]) * step * scale.float()
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
