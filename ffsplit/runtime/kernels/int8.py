"""Products with int8 weights, one scale per output row, and inputs that are quantized at run time.

Each token has its own scale, so its result does not depend on its neighbours in a batch. On the CPU oneDNN
multiplies unsigned inputs (zero is 128) by signed weights (with VNNI if the processor has it). The steps
around the product work on a few tokens at a time, which stay in the processor's cache for all the steps.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ffsplit.compat.torch import int8_pack, int8_product, int8_product_plain
from ffsplit.ffn.quantization import SCALE_DTYPE

SMALLEST_CUDA_ROWS = 17
"""cuBLAS multiplies int8 matrices of more than 16 rows."""

MANY = 16384
"""From this many values on, two vectorized conversions are faster than one that is not vectorized."""
INPUT_BLOCK, OUTPUT_BLOCK = 1 << 17, 1 << 20
"""Numbers per thread that are quantized, or come out of a product, at a time."""
ZERO, LARGEST = 128, 127
SMALLEST_STEP = torch.finfo(torch.float32).smallest_normal
T = TypeVar("T")
NO_OP = ("none", "none")
POST_OPS = {
    "GELUActivation": ("gelu", "none"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", "none"),
}
"""Activation modules that oneDNN applies to the products of one token itself."""


def _gelu_tanh_(y: Tensor) -> Tensor:
    """Tanh GELU in place, as y * sigmoid: torch's own is not vectorized in some versions."""
    inner = (y * y).mul_(0.0713548162726).add_(1.5957691216057).mul_(y)
    return y.mul_(inner.sigmoid_())


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "GELUActivation": torch.ops.aten.gelu_.default,
    "GELUTanh": _gelu_tanh_,
    "ReLU": torch.relu_,
}
"""The same activations, applied to each block of tokens while it is in the cache."""


class Inputs(NamedTuple):
    """Inputs as bytes [T, columns]: x is about (byte - ZERO) * step.

    `step` is [T, 1], or a number for one token.
    """

    integers: Tensor
    step: Any
    linears: list[Any]
    """The linear layers called with these inputs, of those that may share a matrix."""


class LastOf(Generic[T]):
    """What this thread last computed from a tensor, as long as the tensor exists unchanged."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def get(self, x: Tensor) -> T | None:
        held = getattr(self._mine, "held", None)
        return held[2] if held is not None and held[0]() is x and held[1] == _version(x) else None

    def keep(self, x: Tensor, made: T) -> T:
        mine = self._mine.__dict__

        def forget(gone: Any) -> None:  # may run in any thread
            if mine.get("held", (None,))[0] is gone:
                mine.pop("held", None)

        mine["held"] = weakref.ref(x, forget), _version(x), made
        return made


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class SharedInputs:
    """Quantizes inputs once for several linear layers that are called with the same tensor in turn.

    Their matrices are packed and unpacked under its lock. A lock cannot be copied, so a copy has its own.
    """

    def __init__(self) -> None:
        self._last: LastOf[Inputs] = LastOf()
        self.lock = threading.RLock()

    def of(self, x: Tensor) -> Inputs:
        inputs = self._last.get(x)
        if inputs is None:
            inputs = self._last.keep(x, _as_bytes(x.reshape(-1, x.shape[-1])))
        return inputs

    def __reduce__(self) -> Any:
        """A copy of a model shares inputs among its own layers."""
        return SharedInputs, ()


@dataclass(frozen=True)
class Packed:
    """A matrix in oneDNN's form, and its scales. Inputs and outputs have any floating-point dtype."""

    weight: Tensor
    scale: Tensor
    zero_points: Tensor
    inputs: SharedInputs

    def __call__(self, x: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
        bias = bias if bias is None or bias.dtype == torch.float32 else bias.float()
        name = type(activation).__name__
        inputs = self.inputs.of(x)
        if len(inputs.integers) == 1:
            applied = name in POST_OPS
            y = self._product(inputs.integers, inputs.step, bias, post_op=POST_OPS.get(name, NO_OP))
            y = y.to(x.dtype)
        else:
            applied = name in IN_PLACE
            y = self._products(inputs, bias, IN_PLACE.get(name), x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if activation is None or applied else activation(y)

    def _products(
        self,
        inputs: Inputs,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The products of many tokens, each times its step."""
        (num_tokens, _), num_rows = inputs.integers.shape, len(self.scale)
        size, is_float = min(num_tokens, _block(OUTPUT_BLOCK, num_rows)), dtype == torch.float32
        whole = size == num_tokens and is_float
        y = None if whole else self.scale.new_empty(num_tokens, num_rows, dtype=dtype)
        for start in range(0, num_tokens, size):
            block = slice(start, start + size)
            product = self._product(inputs.integers[block], 1.0, None)
            target = y[block] if y is not None and is_float else product
            if bias is None:
                torch.mul(product, inputs.step[block], out=target)
            else:
                torch.addcmul(bias, product, inputs.step[block], out=target)
            if activation is not None:
                activation(target)
            if y is not None and not is_float:
                y[block] = target
        return product if y is None else y

    def _product(
        self, integers: Tensor, step: float, bias: Tensor | None, *, post_op: tuple[str, str] = NO_OP
    ) -> Tensor:
        return int8_product(
            integers, step, ZERO, self.weight, self.scale, self.zero_points, bias, post_op=post_op
        )

    def takes(self, x: Tensor, *, compiling: bool) -> bool:
        """Not while compiling: oneDNN's own layout cannot be traced."""
        return x.is_cpu and not compiling

    def tensors(self) -> dict[str, Tensor]:
        """The matrix [rows, columns] and its scales [rows, 1] as stored."""
        return {
            "weight": self.weight.to_dense().t().contiguous(),
            "weight_scale": self.scale.to(SCALE_DTYPE)[:, None],
        }


class SharedProduct:
    """The product of one tensor with a matrix that holds the rows of several linear layers."""

    def __init__(self, packed: Packed, linears: Sequence[Any]) -> None:
        self.packed, self.linears = packed, linears
        self._last: LastOf[tuple[Tensor, set[int]]] = LastOf()

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Some columns of the product. Each column is given out once, as it may be changed in place."""
        y, given = self._last.get(x) or (None, set())
        if y is None or start in given:
            y, given = self._last.keep(x, (self.packed(x, None), set()))
        given.add(start)
        return y[..., start:stop]


@dataclass(frozen=True)
class PackedRows:
    """One layer's rows of a matrix that is packed for several."""

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


def together(
    packed: Sequence[Packed | PackedRows], linears: Sequence[Any], *, inputs: SharedInputs
) -> list[PackedRows]:
    """Pack the matrices of layers with the same inputs as one."""
    stored = [each.tensors() for each in packed]
    weight, scale = (torch.cat([each[name] for each in stored]) for name in ("weight", "weight_scale"))
    stops = list(accumulate(len(each["weight"]) for each in stored))
    product = SharedProduct(pack(weight, scale, inputs=inputs), linears)
    return [PackedRows(product, *pair) for pair in zip([0, *stops], stops, strict=False)]


def _block(num_elements: int, width: int) -> int:
    """How many rows of this width to work on at a time."""
    return max(1, torch.get_num_threads() * num_elements // width)


def _as_bytes(rows: Tensor) -> Inputs:
    """A matrix [T, columns] as bytes, with one step per token. Rounds by adding a half and truncating."""
    num_tokens, num_columns = rows.shape
    if num_tokens == 1:
        return _token_as_bytes(rows.float())
    size = min(num_tokens, _block(INPUT_BLOCK, num_columns))
    integers = torch.empty(num_tokens, num_columns, dtype=torch.uint8)
    step_T1 = torch.empty(num_tokens, 1)
    half, scratch = torch.full((num_columns,), ZERO + 0.5), torch.empty(size, num_columns)
    narrow = torch.empty(size, num_columns, dtype=torch.int16)
    for start in range(0, num_tokens, size):
        x, target, step = (each[start : start + size] for each in (rows, integers, step_T1))
        values = scratch[: len(x)]
        x = x if x.dtype == torch.float32 else values.copy_(x)
        torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_(), out=step)
        inverse = step.div_(LARGEST).clamp_(min=SMALLEST_STEP).reciprocal()
        torch.addcmul(half, x, inverse, out=values)
        if values.numel() >= MANY:  # torch vectorizes conversions to and from 16 bits
            values = narrow[: len(x)].copy_(values)
        target.copy_(values)
    return Inputs(integers, step_T1, [])


def _token_as_bytes(row: Tensor) -> Inputs:
    """The same for one token [1, columns], with numbers instead of tensors, which is faster."""
    low, high = row.aminmax()
    step = max(max(high.item(), -low.item()) / LARGEST, SMALLEST_STEP)
    if not math.isfinite(step):
        return Inputs(torch.zeros_like(row, dtype=torch.uint8), math.nan, [])
    return Inputs(torch.rsub(row, ZERO + 0.5, alpha=-1 / step).to(torch.uint8), step, [])


def packs(x: Tensor) -> bool:
    """Whether there is a kernel for inputs like these: on the CPU, if torch has it."""
    return x.is_cpu and _has_onednn()


@cache
def _has_onednn() -> bool:
    return "onednn" in torch.backends.quantized.supported_engines


def pack(weight: Tensor, weight_scale: Tensor, *, inputs: SharedInputs) -> Packed:
    """Pack a matrix [rows, columns] of int8."""
    packed = int8_pack(weight)
    zero_points = torch.zeros(len(weight), dtype=torch.long)
    return Packed(packed, weight_scale[:, 0].float().contiguous(), zero_points, inputs)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `matmul` takes these: always on the CPU; on CUDA if compiled and of a size cuBLAS takes."""
    if x.device.type == "cuda":
        return torch.compiler.is_compiling() and weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0
    return x.device.type == "cpu"


def matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product by plain operations, which torch.compile fuses around one integer GEMM.

    On CUDA rows of zeros are added up to the number that cuBLAS needs.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    num_tokens = rows.shape[0]
    step_T1 = (rows.abs().amax(1, True) / LARGEST).clamp(min=SMALLEST_STEP)  # as in `_as_bytes`
    integers = (rows * (1 / step_T1) + 0.5).floor().to(torch.int8)
    if x.is_cuda:
        zeros = integers.new_zeros(max(0, SMALLEST_CUDA_ROWS - num_tokens), rows.shape[1])
        integers = torch.cat([integers, zeros])
    product = int8_product_plain(integers, weight.t())[:num_tokens].float()
    y = product * step_T1 * scale.float()
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
