"""The tensors of one FFN, whole or split, as immutable records that can be run.

Shape suffixes: T tokens, D hidden size, N neurons, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ffsplit.ffn.activations import Activation, gated
from ffsplit.ffn.quantization import dequantize
from ffsplit.ffn.shapes import Dense, Format, Integer, LayerLayout, LowRank, PartLayout


@dataclass(frozen=True)
class LinearMap:
    """y = W x + bias, with W [rows, columns] stored in some format."""

    format: Format
    tensors: Mapping[str, Tensor]
    bias: Tensor | None = None
    num_columns: int | None = None
    """Set if the tensors do not tell it: two 4-bit integers share a byte."""

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None = None) -> LinearMap:
        return cls(Dense(), {"weight": weight}, bias)

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LinearMap:
        """W = left [rows, R] @ right [R, columns]."""
        return cls(LowRank(rank=right.shape[0]), {"left": left, "right": right}, bias)

    @property
    def weight(self) -> Tensor:
        """W as one matrix, whatever its format."""
        if isinstance(self.format, LowRank):
            return self.tensors["left"] @ self.tensors["right"]
        if isinstance(self.format, Integer):
            assert self.num_columns is not None
            return dequantize(self.tensors, num_columns=self.num_columns, group_size=self.format.group_size)
        return self.tensors["weight"]

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.format, LowRank):
            y = x @ self.tensors["right"].T @ self.tensors["left"].T
        else:
            y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def stacked(maps: Sequence[LinearMap]) -> LinearMap:
    """Combine maps of one format and the same inputs into one map, with their outputs concatenated."""
    tensors = {name: torch.cat([each.tensors[name] for each in maps]) for name in maps[0].tensors}
    biases = [each.bias for each in maps if each.bias is not None]
    return replace(maps[0], tensors=tensors, bias=torch.cat(biases) if biases else None)


def _side_by_side(maps: Sequence[LinearMap]) -> LinearMap:
    """Combine maps of one format into one map that sums their outputs, with their inputs concatenated."""
    tensors = {name: torch.cat([each.tensors[name] for each in maps], dim=1) for name in maps[0].tensors}
    widths = [each.num_columns for each in maps if each.num_columns is not None]
    return LinearMap(maps[0].format, tensors, num_columns=sum(widths) if widths else None)


@dataclass(frozen=True)
class FFNPart:
    """Some of an FFN's neurons: `neurons` [N] are their indices in the original, ascending.

    `rows` are tensors [N, ...] between the up projection and the activation, such as the kernels of a
    depthwise convolution. An FFN that has some can be narrowed, but not be run on tokens.
    """

    neurons: Tensor
    up: LinearMap
    gate: LinearMap | None
    down: LinearMap
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> PartLayout:
        gate = None if self.gate is None else self.gate.format
        return PartLayout(num_neurons=len(self.neurons), up=self.up.format, gate=gate, down=self.down.format)

    def hidden(self, x_TD: Tensor, activation: Activation) -> Tensor:
        """Neuron activations a_n, the input of the down projection: [T, N]."""
        assert not self.rows, "its neurons see other positions than a token's own"
        up_TN = self.up(x_TD)
        return activation(up_TN) if self.gate is None else gated(activation, self.gate(x_TD), up_TN)

    def select(self, positions: Tensor) -> FFNPart:
        """The neurons at `positions` [n] of this part, which must be dense."""

        def rows(linear: LinearMap) -> LinearMap:
            bias = None if linear.bias is None else linear.bias[positions]
            return LinearMap.dense(linear.weight[positions], bias)

        gate = None if self.gate is None else rows(self.gate)
        down = LinearMap.dense(self.down.weight[:, positions])
        own = {name: tensor[positions] for name, tensor in self.rows.items()}
        return FFNPart(self.neurons[positions], rows(self.up), gate, down, own)


@dataclass(frozen=True)
class FFNWeights:
    """An FFN as heavy hitters plus the rest; a dense one has all its neurons in `heavy`."""

    heavy: FFNPart | None
    light: FFNPart | None
    down_bias: Tensor | None
    activation: Activation

    @property
    def parts(self) -> tuple[FFNPart, ...]:
        return tuple(part for part in (self.heavy, self.light) if part is not None)

    @property
    def layout(self) -> LayerLayout:
        return LayerLayout(
            heavy=None if self.heavy is None else self.heavy.layout,
            light=None if self.light is None else self.light.layout,
            down_bias=self.down_bias is not None,
        )

    def folded(self) -> FFNWeights:
        """The same function with both parts as one, neurons unsorted, if their layout can fold."""
        if not self.layout.can_fold:
            return self
        assert self.heavy is not None and self.light is not None
        pairs = (self.heavy, self.light)
        gates = [part.gate for part in pairs if part.gate is not None]
        part = FFNPart(
            neurons=torch.cat([part.neurons for part in pairs]),
            up=stacked([part.up for part in pairs]),
            gate=stacked(gates) if gates else None,
            down=_side_by_side([part.down for part in pairs]),
            rows={name: torch.cat([part.rows[name] for part in pairs]) for name in self.heavy.rows},
        )
        return replace(self, heavy=part, light=None)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The FFN's output [T, D]."""
        y_TD = torch.zeros_like(x_TD) if self.down_bias is None else self.down_bias.expand_as(x_TD)
        for part in self.parts:
            y_TD = y_TD + part.down(part.hidden(x_TD, self.activation))
        return y_TD

    def split(self, heavy_neurons: Tensor) -> FFNWeights:
        """Split a dense FFN: `heavy_neurons` [n] ascending indices go to `heavy`, the rest to `light`."""
        assert self.heavy is not None and self.light is None, "only a dense FFN is split"
        is_light = torch.ones(len(self.heavy.neurons), dtype=torch.bool)
        is_light[heavy_neurons] = False
        light_neurons = is_light.nonzero().flatten()
        return replace(
            self,
            heavy=self.heavy.select(heavy_neurons) if len(heavy_neurons) else None,
            light=self.heavy.select(light_neurons) if len(light_neurons) else None,
        )
