"""Linear maps with integer weights, run by the machine's own kernels.

8 bits: inputs become integers too, while the model runs (one scale and zero point a batch in encoders,
one a token where `per_token`), and the product is of integers. 4 bits: weights alone, inputs stay as they
are. Whatever no kernel takes, gradients included, goes through the matrix in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.ffn import Integer
from ffsplit.quantization import dequantize
from ffsplit.runtime import int4_kernels, int8_kernels

Packed = int8_kernels.Packed | int4_kernels.Packed

INITIALIZED = True
"""What transformers asks a module before it initializes it, which a model's own code cannot do for these."""


class IntegerMap(nn.Module):
    """y = (integers * scales) x + bias.

    On the CPU the weight is packed for its kernel when it is first used; the packed form then takes the
    place of the stored one, which comes back whenever the module is saved, moved or copied.
    """

    _is_hf_initialized = INITIALIZED
    weight: Tensor | None
    weight_scale: Tensor

    def __init__(
        self, format: Integer, num_rows: int, num_columns: int, *, bias: bool, per_token: bool = False
    ) -> None:
        super().__init__()
        self.num_rows, self.num_columns = num_rows, num_columns
        self.num_bits, self.group_size = format.num_bits, format.group_size
        self.per_token = per_token
        num_groups = 1 if format.group_size is None else -(-num_columns // format.group_size)
        dtype, stored = (
            (torch.int8, num_columns) if format.num_bits == 8 else (torch.uint8, -(-num_columns // 2))
        )
        self.register_buffer("weight", torch.empty(num_rows, stored, dtype=dtype))
        self.register_buffer("weight_scale", torch.empty(num_rows, num_groups, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None
        self.activation: nn.Module | None = None  # of the products, where the kernel can do it on the way
        self._packed: Packed | None = None
        self.register_state_dict_pre_hook(_unpack_before)  # type: ignore[no-untyped-call]

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The map's output, added to `plus`: a bias, or a tensor of the output's shape."""
        bias, rest = (self.bias, None) if plus is None else (plus, None) if plus.dim() == 1 else (None, plus)
        y = self._output(x, bias)
        return y if rest is None else y + rest

    def _output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self._activated(self._floating(x, bias))
        compiling = torch.compiler.is_compiling()
        if self._packed is None and not compiling:
            self._pack(x)
        packed = self._packed
        if packed is not None and packed.takes(x, compiling=compiling):
            return packed(x, bias, self.activation)
        if packed is not None and compiling:
            raise RuntimeError("packed weights cannot be compiled: call ffsplit.runtime.integer_map.unpack")
        self.unpack()
        return self._activated(self._plain(x, bias))

    def _activated(self, y: Tensor) -> Tensor:
        if self.activation is None:
            return y
        activated: Tensor = self.activation(y)
        return activated

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, columns] in floating point."""
        self.unpack()
        assert self.weight is not None
        tensors = {"weight": self.weight, "weight_scale": self.weight_scale}
        return dequantize(tensors, num_columns=self.num_columns, group_size=self.group_size, dtype=dtype)

    def _plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same map by operations that torch.compile and other devices know."""
        if self.weight is not None and self._has_one_scale and int8_kernels.multiplies(x, self.weight):
            scale = self.weight_scale[:, 0]
            return int8_kernels.matmul(x, self.weight, scale, bias, per_token=self.per_token)
        return self._floating(x, bias)

    def _floating(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, self.float_weight(x.dtype), None if bias is None else bias.to(x.dtype))

    @property
    def _has_one_scale(self) -> bool:
        return self.num_bits == 8 and self.weight_scale.shape[1] == 1

    def _pack(self, x: Tensor) -> None:
        """Exchange the stored integers for what a kernel takes, where there is one for them."""
        assert self.weight is not None
        if self._has_one_scale:
            packed: Packed | None = int8_kernels.pack(
                self.weight, self.weight_scale, per_token=self.per_token
            )
        elif self.num_bits == 4:
            size = int4_kernels.kernel_group_size(self.num_columns, self.group_size)
            packed = int4_kernels.pack(self.weight, self.weight_scale, group_size=size, like=x)
        else:
            packed = None
        if packed is not None:
            self.weight, self._packed = None, packed

    def unpack(self) -> None:
        """Put the stored integers back where they were packed."""
        if self._packed is not None:
            self.weight, self._packed = self._packed.integers(), None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return dict(self.__dict__)

    def extra_repr(self) -> str:
        return f"{self.num_columns}, {self.num_rows}, num_bits={self.num_bits}, group_size={self.group_size}"


def _unpack_before(module: nn.Module, *_: Any) -> None:
    assert isinstance(module, IntegerMap)
    module.unpack()


def unpack(model: nn.Module) -> None:
    """Put every packed weight of a model back into its stored form, as before torch.compile."""
    for module in model.modules():
        if isinstance(module, IntegerMap):
            module.unpack()
