"""Linear layers with integer weights, run by the machine's own kernels.

8 bits: inputs are quantized too while the model runs, with one scale per token, and the product is of
integers. On a GPU this happens only in a compiled model, and not for a few rows. 4 bits: only weights are
quantized, inputs stay in floating point. Whatever no kernel takes, including gradients, is computed with the
dequantized matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.ffn.quantization import dequantize, joined, parted
from ffsplit.ffn.shapes import Integer
from ffsplit.runtime.kernels import int4 as int4_kernels
from ffsplit.runtime.kernels import int8 as int8_kernels
from ffsplit.runtime.kernels import int8_gemv_cuda

Packed = int8_kernels.Packed | int8_kernels.PackedRows | int4_kernels.Packed

INITIALIZED = True
"""Value of the flag that stops transformers from initializing a module: it could not initialize these."""


class QuantizedLinear(nn.Module):
    """y = (integers * scales) x + bias.

    `weight` is the stored form of the matrix, as made by `joined`. On the CPU the matrix is packed for its
    kernel on first use. The packed form then replaces the stored one, which is restored whenever the module
    is saved, moved or copied. Any number of threads may call the layer: a thread that exchanges the forms
    holds the lock of its `inputs`, and a packed form that another thread is using stays valid.
    """

    _is_hf_initialized = INITIALIZED
    _packed: Packed | None = None
    weight: Tensor | None

    def __init__(self, format: Integer, num_rows: int, num_columns: int, *, bias: bool) -> None:
        super().__init__()
        self.format, self.num_rows, self.num_columns = format, num_rows, num_columns
        size = self.size_bytes
        self.register_buffer("weight", torch.empty(size + size % 2, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None
        self.activation: nn.Module | None = None  # applied to the products, by the kernel if it can
        self.inputs = int8_kernels.SharedInputs()

    @property
    def num_bits(self) -> int:
        return self.format.num_bits

    @property
    def group_size(self) -> int | None:
        return self.format.group_size

    @property
    def num_groups(self) -> int:
        """Scales per row."""
        return 1 if self.group_size is None else -(-self.num_columns // self.group_size)

    @property
    def size_bytes(self) -> int:
        """Bytes of the integers and scales."""
        return self.format.size_bytes(self.num_rows, self.num_columns, itemsize=1)

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def tensors(self) -> dict[str, Tensor]:
        """`weight`, integers [rows, columns] or half as many bytes, and `weight_scale` [rows, groups]."""
        return parted(
            self._stored(),
            num_bits=self.num_bits,
            num_rows=self.num_rows,
            num_groups=self.num_groups,
            num_columns=self.num_columns,
        )

    def _stored(self) -> Tensor:
        """`weight`, restored if the matrix was packed."""
        if torch.compiler.is_compiling():  # nothing is packed while compiling, and a lock cannot be traced
            assert self.weight is not None
            return self.weight
        with self.inputs.lock:
            self.unpack()
            assert self.weight is not None
            return self.weight

    def hold(self, tensors: dict[str, Tensor]) -> None:
        """Set the integers and scales of the matrix, in the form that `tensors` returns."""
        with self.inputs.lock:
            self.weight, self._packed = joined(tensors), None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The layer's output, added to `plus`: a bias, or a tensor of the output's shape."""
        if plus is not None and plus.dim() > 1:
            return self._output(x, None) + plus
        return self._output(x, self.bias if plus is None else plus)

    def _output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return self._activated(self._floating(x, bias))
        compiling, packed = torch.compiler.is_compiling(), self._packed
        if packed is None and not compiling:
            packed = self._pack(x)
        if packed is not None and packed.takes(x, compiling=compiling):
            y = packed(x, bias, self.activation)
            if self.num_bits == 8 and self.bias is None and self.activation is None:
                self._join(x, packed)
            return y
        if packed is not None and compiling:
            raise RuntimeError(
                "packed weights cannot be compiled: call ffsplit.runtime.quantized_linear.unpack"
            )
        return self._activated(self._plain(x, bias))

    def _activated(self, y: Tensor) -> Tensor:
        if self.activation is None:
            return y
        activated: Tensor = self.activation(y)
        return activated

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, columns] in floating point."""
        return dequantize(
            self.tensors(), num_columns=self.num_columns, group_size=self.group_size, dtype=dtype
        )

    def _plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same layer by operations that torch.compile and other devices support.

        An integer product takes a dozen operations besides the GEMM. On a GPU it pays only if they are fused;
        otherwise the weights are dequantized.
        """
        if self._has_one_scale:
            weight, scale = self.tensors().values()
            if int8_gemv_cuda.takes(x, weight):
                return int8_gemv_cuda.product(x, weight, scale[:, 0].contiguous(), bias)
            if int8_kernels.multiplies(x, weight):
                return int8_kernels.matmul(x, weight, scale[:, 0], bias)
        return self._floating(x, bias)

    def _floating(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, self.float_weight(x.dtype), None if bias is None else bias.to(x.dtype))

    @property
    def _has_one_scale(self) -> bool:
        return self.num_bits == 8 and self.num_groups == 1

    def _pack(self, x: Tensor) -> Packed | None:
        """Pack the stored integers once for their kernel. None if there is no kernel."""
        if not self._has_kernel(x):
            return None
        with self.inputs.lock:
            if self._packed is None:
                weight, scale = self.tensors().values()
                if self.num_bits == 8:
                    packed: Packed = int8_kernels.pack(weight, scale, inputs=self.inputs)
                else:
                    size = self._kernel_group_size
                    assert size is not None, "checked by _has_kernel"
                    packed = int4_kernels.pack(
                        weight, scale, stored_group_size=self.group_size, group_size=size, like=x
                    )
                self.weight, self._packed = None, packed
            return self._packed

    def _has_kernel(self, x: Tensor) -> bool:
        if self.num_bits == 8:
            return self.num_groups == 1 and int8_kernels.packs(x)
        return int4_kernels.packs(self.num_rows, self._kernel_group_size, like=x)

    @cached_property
    def _kernel_group_size(self) -> int | None:
        return int4_kernels.kernel_group_size(self.num_columns, self.group_size)

    def _join(self, x: Tensor, packed: Packed) -> None:
        """Merge matrices with the layers that this thread called with the same inputs just before."""
        given = self.inputs.of(x).linears
        given.append(self)
        if not isinstance(packed, int8_kernels.Packed):
            return
        with self.inputs.lock:
            linears = list(dict.fromkeys(member for each in given for member in each._together()))
            if len(linears) > 1 and isinstance(self._packed, int8_kernels.Packed):
                rows = int8_kernels.together([each._packed for each in linears], linears, inputs=self.inputs)
                for each, its_rows in zip(linears, rows, strict=True):
                    each._packed = its_rows

    def _together(self) -> Sequence[QuantizedLinear]:
        """The packed layers that it shares a matrix with, including itself."""
        if isinstance(self._packed, int8_kernels.PackedRows):
            return [each for each in self._packed.product.linears if each.is_packed]
        return [self] if isinstance(self._packed, int8_kernels.Packed) else []

    def unpack(self) -> None:
        """Restore the stored integers if they were packed."""
        with self.inputs.lock:
            if self._packed is not None:
                self.hold(self._packed.tensors())

    def _save_to_state_dict(self, *given: Any) -> None:
        with self.inputs.lock:
            self.unpack()
            super()._save_to_state_dict(*given)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self.inputs.lock:
            self.unpack()
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        with self.inputs.lock:
            self.unpack()
            return dict(self.__dict__) | {"_buffers": dict(self._buffers)}

    def extra_repr(self) -> str:
        return f"{self.num_columns}, {self.num_rows}, num_bits={self.num_bits}, group_size={self.group_size}"


def unpack(model: nn.Module) -> None:
    """Restore the stored form of every packed weight of a model, as torch.compile needs it."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.unpack()


def share_inputs(linears: Iterable[nn.Module]) -> None:
    """Let the quantized layers among these quantize their inputs once if they get the same tensor."""
    inputs = int8_kernels.SharedInputs()
    for each in linears:
        if isinstance(each, QuantizedLinear):
            each.inputs = inputs
