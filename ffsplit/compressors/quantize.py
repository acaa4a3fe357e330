"""Weights as small integers with scales, per output channel or per group of input channels.

Sources: round to nearest; GPTQ, arXiv:2210.17323, which rounds one input channel at a time and adjusts the
later channels to compensate for the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ffsplit.compressors.base import FLOAT64_BYTES, LayerContext, LayerWork
from ffsplit.compressors.least_squares import ridged_root, second_moment
from ffsplit.config import Record
from ffsplit.ffn.quantization import fake_round, quantize_rows, scales_of
from ffsplit.ffn.shapes import Dense, FFNShape, Integer, LayerLayout, PartLayout
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap


class QuantizeCompressor(Record):
    """Quantize the dense matrices of `parts`; biases stay as they are.

    `group_size` None means one scale per output channel. `method: gptq` uses the sampled inputs, with a
    ridge of `ridge` times the mean squared input.
    """

    kind: Literal["quantize"] = "quantize"
    num_bits: Literal[4, 8] = 8
    """4 is experimental: its kernels are tested and timed, but no recipe that is shipped has it."""
    group_size: int | None = Field(default=None, ge=2)
    method: Literal["rtn", "gptq"] = "rtn"
    parts: Literal["heavy", "light", "both"] = "both"
    ridge: float = Field(default=1e-2, ge=0)

    @property
    def adds_down_bias(self) -> bool:
        return False

    def plan(self, layout: LayerLayout, *, shape: FFNShape, budget: int) -> LayerLayout | None:
        """The same elements in fewer bytes."""
        planned = layout.model_copy(
            update={
                "heavy": self._planned(layout.heavy) if self.parts != "light" else layout.heavy,
                "light": self._planned(layout.light) if self.parts != "heavy" else layout.light,
            }
        )
        return planned if planned.num_elements(shape) <= budget else None

    def _planned(self, part: PartLayout | None) -> PartLayout | None:
        if part is None or not part.is_dense:
            return part
        format = Integer(num_bits=self.num_bits, group_size=self.group_size)
        gate = None if part.gate is None else format
        return part.model_copy(update={"up": format, "gate": gate, "down": format})

    def memory_bytes(self, work: LayerWork) -> int:
        """The matrices in float64, or with gptq the second moments of their inputs."""
        num_neurons, hidden = work.shape.num_neurons, work.shape.hidden_size
        square = max(num_neurons, hidden) ** 2
        return 3 * (square if self.method == "gptq" else num_neurons * hidden) * FLOAT64_BYTES

    def operations(self, work: LayerWork) -> float:
        num_neurons, hidden = work.shape.num_neurons, work.shape.hidden_size
        return 20.0 * num_neurons * hidden * min(num_neurons, hidden)

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        return replace(
            ffn,
            heavy=self._quantized(ffn.heavy, layout.heavy, ffn, context),
            light=self._quantized(ffn.light, layout.light, ffn, context),
        )

    def _quantized(
        self, part: FFNPart | None, layout: PartLayout | None, ffn: FFNWeights, context: LayerContext
    ) -> FFNPart | None:
        if part is None or layout is None or not isinstance(layout.up, Integer):
            return part
        up = self._linear(part.up, layout.up, context.chunks())
        gate = None if part.gate is None else self._linear(part.gate, layout.up, context.chunks())
        hidden = (part.hidden(x_TD, ffn.activation) for x_TD in context.chunks())
        return FFNPart(part.neurons, up, gate, self._linear(part.down, layout.up, hidden))

    def _linear(self, linear: LinearMap, format: Integer, inputs: Iterator[Tensor]) -> LinearMap:
        assert isinstance(linear.format, Dense), "only a dense matrix is quantized"
        weight = linear.weight
        scales = scales_of(weight, num_bits=format.num_bits, group_size=format.group_size)
        if self.method == "gptq":
            weight = _gptq(weight, scales, format, second_moment(inputs), ridge=self.ridge)
        tensors = quantize_rows(weight, scales, num_bits=format.num_bits, group_size=format.group_size)
        return LinearMap(format, tensors, linear.bias, num_columns=weight.shape[1])


def _root_of_inverse(upper: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (R R^T)^-1, where R is `upper`: that is, the inverse of R.

    Inverting R R^T itself would give a rounding error in proportion to its largest element, which would hide
    the smallest ones.
    """
    root: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
    return root


def _gptq(weight: Tensor, scales: Tensor, format: Integer, moment: Tensor, *, ridge: float) -> Tensor:
    """A matrix on the grid of `scales` whose outputs are close to those of `weight` on the sampled inputs."""
    upper = _root_of_inverse(ridged_root(moment.flip(0, 1), ridge=ridge).flip(0, 1))
    left, result = weight.double().clone(), torch.empty_like(weight)
    group_size = format.group_size or weight.shape[1]
    for column in range(weight.shape[1]):
        scale = scales[:, column // group_size, None]
        on_grid = fake_round(left[:, column : column + 1].float(), scale, num_bits=format.num_bits)[:, 0]
        result[:, column] = on_grid
        error = (left[:, column] - on_grid.double()) / upper[column, column]
        left[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return result
