"""The module that runs a split FFN inside a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.ffn import FFNShape, Format, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.runtime.integer_map import INITIALIZED, IntegerMap


class DenseMap(nn.Module):
    """y = W x + bias."""

    _is_hf_initialized = INITIALIZED

    def __init__(self, num_rows: int, num_columns: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, num_columns))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias if plus is None else plus)


class LowRankMap(nn.Module):
    """y = left (right x) + bias: the small side first."""

    _is_hf_initialized = INITIALIZED

    def __init__(self, num_rows: int, num_columns: int, *, rank: int, bias: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(num_rows, rank))
        self.right = nn.Parameter(torch.empty(rank, num_columns))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return linear(functional.linear(x, self.right), self.left, self.bias if plus is None else plus)


def linear(x: Tensor, weight: Tensor, plus: Tensor | None) -> Tensor:
    """x W^T + plus in one product; `plus` is a bias, or a tensor of the output's shape."""
    if plus is None or plus.dim() == 1:
        return functional.linear(x, weight, plus)
    rows = torch.addmm(plus.reshape(-1, plus.shape[-1]), x.reshape(-1, x.shape[-1]), weight.t())
    return rows.view(plus.shape)


def build_map(
    format: Format, num_rows: int, num_columns: int, *, bias: bool, per_token: bool = False
) -> nn.Module:
    """An empty linear map of some format; `per_token` is about the inputs of int8 weights."""
    if isinstance(format, LowRank):
        return LowRankMap(num_rows, num_columns, rank=format.rank, bias=bias)
    if isinstance(format, Integer):
        return IntegerMap(format, num_rows, num_columns, bias=bias, per_token=per_token)
    return DenseMap(num_rows, num_columns, bias=bias)


class FFNPartModule(nn.Module):
    """The sum over one part's neurons, added to `plus`."""

    _is_hf_initialized = INITIALIZED

    def __init__(
        self, layout: PartLayout, shape: FFNShape, activation: nn.Module, *, per_token: bool = False
    ) -> None:
        super().__init__()
        n, d = layout.num_neurons, shape.hidden_size

        def made(format: Format, num_rows: int, num_columns: int, *, bias: bool) -> nn.Module:
            return build_map(format, num_rows, num_columns, bias=bias, per_token=per_token)

        self.up = made(layout.up, n, d, bias=shape.up_bias)
        self.gate = None if layout.gate is None else made(layout.gate, n, d, bias=shape.up_bias)
        self.down = made(layout.down, d, n, bias=False)
        first = self.up if self.gate is None else self.gate
        self.activation = activation
        if isinstance(first, IntegerMap):
            first.activation, self.activation = activation, nn.Identity()

    def forward(self, x: Tensor, plus: Tensor | None) -> Tensor:
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        output: Tensor = self.down(hidden, plus)
        return output


class SplitFFN(nn.Module):
    """FFN(x) = heavy(x) + light(x) + bias; the sum is taken by the products themselves.

    It also holds a guard: a tensor under the original name of one of the FFN's weights, of a shape
    that cannot match, so that a load without ffsplit fails instead of starting from random weights.
    `per_token` is for int8 weights: whether each token's inputs get a scale of their own.
    """

    _is_hf_initialized = INITIALIZED

    def __init__(
        self,
        layout: LayerLayout,
        shape: FFNShape,
        activation: nn.Module,
        *,
        guard: str | None = None,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        heavy, light = (
            None if part is None else FFNPartModule(part, shape, activation, per_token=per_token)
            for part in (layout.heavy, layout.light)
        )
        self.heavy, self.light = heavy, light
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
        y: Tensor | None = self.down_bias
        if self.heavy is not None:
            y = self.heavy(x, y)
        if self.light is not None:
            y = self.light(x, y)
        assert y is not None
        return y
