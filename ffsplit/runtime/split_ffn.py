"""The module that runs a split FFN inside a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.ffn import FFNShape, Format, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.quantization import dequantize


class DenseMap(nn.Module):
    """y = W x + bias."""

    def __init__(self, num_rows: int, num_columns: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, num_columns))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class LowRankMap(nn.Module):
    """y = left (right x) + bias: the small side first."""

    def __init__(self, num_rows: int, num_columns: int, *, rank: int, bias: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(num_rows, rank))
        self.right = nn.Parameter(torch.empty(rank, num_columns))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.right), self.left, self.bias)


class IntegerMap(nn.Module):
    """y = (integers * scales) x + bias, the weight made floating point when it is used."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, format: Integer, num_rows: int, num_columns: int, *, bias: bool) -> None:
        super().__init__()
        self.num_columns, self.group_size = num_columns, format.group_size
        num_groups = 1 if format.group_size is None else -(-num_columns // format.group_size)
        dtype, stored = (
            (torch.int8, num_columns) if format.num_bits == 8 else (torch.uint8, -(-num_columns // 2))
        )
        self.register_buffer("weight", torch.empty(num_rows, stored, dtype=dtype))
        self.register_buffer("weight_scale", torch.empty(num_rows, num_groups, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tensors = {"weight": self.weight, "weight_scale": self.weight_scale}
        weight = dequantize(tensors, num_columns=self.num_columns, group_size=self.group_size, dtype=x.dtype)
        return functional.linear(x, weight, self.bias)


def build_map(format: Format, num_rows: int, num_columns: int, *, bias: bool) -> nn.Module:
    """An empty linear map of some format."""
    if isinstance(format, LowRank):
        return LowRankMap(num_rows, num_columns, rank=format.rank, bias=bias)
    if isinstance(format, Integer):
        return IntegerMap(format, num_rows, num_columns, bias=bias)
    return DenseMap(num_rows, num_columns, bias=bias)


class FFNPartModule(nn.Module):
    """The sum over one part's neurons."""

    def __init__(self, layout: PartLayout, shape: FFNShape, activation: nn.Module) -> None:
        super().__init__()
        n, d = layout.num_neurons, shape.hidden_size
        self.up = build_map(layout.up, n, d, bias=shape.up_bias)
        self.gate = None if layout.gate is None else build_map(layout.gate, n, d, bias=shape.up_bias)
        self.down = build_map(layout.down, d, n, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        output: Tensor = self.down(hidden)
        return output


class SplitFFN(nn.Module):
    """FFN(x) = heavy(x) + light(x) + bias.

    It also holds a guard: a tensor under the original name of one of the FFN's weights, of a shape
    that cannot match, so that a load without ffsplit fails instead of starting from random weights.
    """

    def __init__(
        self, layout: LayerLayout, shape: FFNShape, activation: nn.Module, *, guard: str | None = None
    ) -> None:
        super().__init__()
        self.heavy = None if layout.heavy is None else FFNPartModule(layout.heavy, shape, activation)
        self.light = None if layout.light is None else FFNPartModule(layout.light, shape, activation)
        self.down_bias = nn.Parameter(torch.empty(shape.hidden_size)) if layout.down_bias else None
        if guard is None:  # whatever holds this FFN has one
            return
        owner: nn.Module = self
        *path, name = guard.split(".")
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(name, torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in (self.heavy, self.light) if part is not None]
        y: Tensor = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
        return y if self.down_bias is None else y + self.down_bias
