"""Weights as small integers with scales, per output channel or per group of input channels.

Rounded to nearest, or by GPTQ. A fraction of the neurons, the heavy hitters, may get more bits than the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ffsplit.compressors.base import FLOAT64_BYTES, LayerContext, LayerWork
from ffsplit.compressors.gptq import moment_of, product_of, round_together
from ffsplit.compressors.least_squares import mirrored, solve_ridge
from ffsplit.config import Record
from ffsplit.ffn.quantization import quantize_rows, scales_of, stored_integers
from ffsplit.ffn.shapes import Dense, FFNShape, Integer, LayerLayout, PartLayout
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap

HEAVY = Integer(num_bits=8)
"""The format of heavy hitters that are split off: as good as the original, with one scale per channel."""


class QuantizeCompressor(Record):
    """Quantize the dense matrices of `parts`; biases stay as they are.

    `group_size` None means one scale per output channel. `method: gptq` uses the sampled inputs, with a
    ridge of `ridge` times the mean squared input. `heavy_fraction` of the neurons of an FFN that is not split
    yet, those with the largest output norm, get int8 weights with one scale per output channel instead.
    """

    kind: Literal["quantize"] = "quantize"
    num_bits: Literal[4, 8] = 8
    group_size: int | None = Field(default=None, ge=2)
    method: Literal["rtn", "gptq"] = "rtn"
    parts: Literal["heavy", "light", "both"] = "both"
    heavy_fraction: float = Field(default=0.0, ge=0, lt=1)
    ridge: float = Field(default=1e-2, ge=0)

    @model_validator(mode="after")
    def _gives_heavy_hitters_more_bits(self) -> QuantizeCompressor:
        if self.heavy_fraction and (self.num_bits != 4 or self.parts != "both"):
            raise ValueError("heavy_fraction gives some neurons 8 bits: it needs num_bits: 4 and parts: both")
        return self

    @property
    def adds_down_bias(self) -> bool:
        return False

    @property
    def format(self) -> Integer:
        return Integer(num_bits=self.num_bits, group_size=self.group_size)

    def plan(
        self, layout: LayerLayout, *, shape: FFNShape, budget: int, multiple: int | None = None
    ) -> LayerLayout | None:
        """The same elements in fewer bytes."""
        if num_heavy := self._num_heavy(layout, unit=multiple or 1):
            (part,) = layout.folded.parts
            light = part.model_copy(update={"num_neurons": part.num_neurons - num_heavy})
            heavy = part.model_copy(update={"num_neurons": num_heavy})
            parts = {"heavy": _in_integers(heavy, HEAVY), "light": _in_integers(light, self.format)}
        else:
            parts = {
                "heavy": layout.heavy if self.parts == "light" else _in_integers(layout.heavy, self.format),
                "light": layout.light if self.parts == "heavy" else _in_integers(layout.light, self.format),
            }
        planned = layout.model_copy(update=parts)
        return planned if planned.num_elements(shape) <= budget else None

    def _num_heavy(self, layout: LayerLayout, *, unit: int) -> int:
        """How many heavy hitters to split off, so that the rest fills whole groups; 0 for an FFN in parts.

        Both are multiples of `unit`, if the whole is: none are split off from an FFN of one unit.
        """
        if not self.heavy_fraction or not layout.folded.is_dense or layout.num_neurons < 2 * unit:
            return 0
        num_neurons, group = layout.num_neurons, math.lcm(self.group_size or 1, unit)
        num_heavy = num_neurons - math.ceil(num_neurons * (1 - self.heavy_fraction) / group) * group
        if num_heavy > 0:
            return num_heavy
        few = num_neurons * self.heavy_fraction
        return group if group <= 2 * few else max(1, int(few) // unit) * unit

    def memory_bytes(self, work: LayerWork) -> int:
        """The matrices in float64; with gptq also the second moment of the widest inputs, and its roots."""
        num_neurons, hidden = work.shape.num_neurons, work.shape.hidden_size
        square = max(num_neurons, hidden) ** 2 if self.method == "gptq" else 0
        return (3 * num_neurons * hidden + 6 * square) * FLOAT64_BYTES

    def operations(self, work: LayerWork) -> float:
        num_neurons, hidden = work.shape.num_neurons, work.shape.hidden_size
        if self.method == "rtn":
            return 20.0 * num_neurons * hidden
        moments = 2.0 * work.num_tokens * (hidden**2 + num_neurons**2)
        roots = 2.0 * (hidden**3 + num_neurons**3)
        return moments + roots + 4.0 * num_neurons * hidden * (2 * hidden + num_neurons)

    def compress(self, ffn: FFNWeights, *, layout: LayerLayout, context: LayerContext) -> FFNWeights:
        if len(layout.parts) == 2 and len(ffn.folded().parts) == 1 and self.heavy_fraction:
            assert layout.heavy is not None
            ffn = _split(ffn.folded(), count=layout.heavy.num_neurons, context=context)
        pairs = ((ffn.heavy, layout.heavy), (ffn.light, layout.light))
        meant = [
            (part, planned.up)
            for part, planned in pairs
            if part is not None and planned is not None and isinstance(planned.up, Integer)
        ]
        if self.method == "gptq" and meant:
            return self._by_gptq(ffn, meant, context)
        return _exchanged(ffn, [(part, _rounded_part(part, format)) for part, format in meant])

    def _by_gptq(
        self, ffn: FFNWeights, meant: Sequence[tuple[FFNPart, Integer]], context: LayerContext
    ) -> FFNWeights:
        """Round what leads into the neurons, then their down projections together.

        The down projections are first fitted to the original's outputs, for the activations that the rounded
        neurons have.
        """
        inputs = moment_of(context.chunks())

        def rounded(linear: LinearMap, format: Integer) -> LinearMap:
            (found,) = self._rounded_together([(linear.weight, format)], inputs)
            return replace(found, bias=linear.bias)

        parts = []
        for part, format in meant:
            gate = None if part.gate is None else rounded(part.gate, format)
            parts.append(replace(part, up=rounded(part.up, format), gate=gate))
        ffn = _exchanged(ffn, [(old, new) for (old, _), new in zip(meant, parts, strict=True)])
        weights, moment = self._fitted_downs(ffn, parts, context)
        formats = [format for _, format in meant]
        downs = self._rounded_together(list(zip(weights, formats, strict=True)), moment)
        new = [replace(part, down=down) for part, down in zip(parts, downs, strict=True)]
        return _exchanged(ffn, list(zip(parts, new, strict=True)))

    def _fitted_downs(
        self, ffn: FFNWeights, parts: Sequence[FFNPart], context: LayerContext
    ) -> tuple[list[Tensor], Tensor]:
        """The down projections of some parts, fitted to the original's outputs, and their inputs' moment."""
        weight_DK = torch.cat([part.down.weight for part in parts], dim=1)
        moment = weight_DK.new_zeros(len(weight_DK.T), len(weight_DK.T), dtype=torch.float64)
        cross = weight_DK.new_zeros(weight_DK.T.shape, dtype=torch.float64)
        for x_TD, y_TD in context.pairs():
            a_TK = torch.cat([part.hidden(x_TD, ffn.activation) for part in parts], dim=1)
            moment += product_of(a_TK, a_TK)
            cross += product_of(a_TK, y_TD - ffn(x_TD))
        moment = mirrored(moment)
        change = solve_ridge(moment, cross, ridge=self.ridge, num_ridged=len(moment))
        fitted = (weight_DK.double() + change.T).to(weight_DK.dtype)
        return list(torch.split(fitted, [len(part.neurons) for part in parts], dim=1)), moment

    def _rounded_together(
        self, matrices: Sequence[tuple[Tensor, Integer]], moment: Tensor
    ) -> list[LinearMap]:
        found = round_together(matrices, moment, ridge=self.ridge)
        return [
            _linear_map(stored_integers(each.integers, each.scales, num_bits=format.num_bits), weight, format)
            for each, (weight, format) in zip(found, matrices, strict=True)
        ]


def _exchanged(ffn: FFNWeights, pairs: Sequence[tuple[FFNPart, FFNPart]]) -> FFNWeights:
    """The FFN with some of its parts replaced: (old, new)."""
    heavy, light = ffn.heavy, ffn.light
    for old, new in pairs:
        heavy, light = new if heavy is old else heavy, new if light is old else light
    return replace(ffn, heavy=heavy, light=light)


def _in_integers(part: PartLayout | None, format: Integer) -> PartLayout | None:
    if part is None or not part.is_dense:
        return part
    gate = None if part.gate is None else format
    return part.model_copy(update={"up": format, "gate": gate, "down": format})


def _split(ffn: FFNWeights, *, count: int, context: LayerContext) -> FFNWeights:
    """A dense FFN with its `count` neurons of the largest output norm as heavy hitters."""
    assert ffn.heavy is not None, "folding leaves one part"
    energy_N = torch.zeros(len(ffn.heavy.neurons), dtype=torch.float64)
    for x_TD in context.chunks():
        energy_N += ffn.heavy.hidden(x_TD, ffn.activation).square().sum(0, dtype=torch.float64).cpu()
    energy_N *= ffn.heavy.down.weight.square().sum(0, dtype=torch.float64).cpu()
    return ffn.split(energy_N.topk(count).indices.sort().values)


def _rounded_part(part: FFNPart, format: Integer) -> FFNPart:
    def rounded(linear: LinearMap) -> LinearMap:
        assert isinstance(linear.format, Dense), "only a dense matrix is quantized"
        weight, num_bits, group_size = linear.weight, format.num_bits, format.group_size
        scales = scales_of(weight, num_bits=num_bits, group_size=group_size)
        tensors = quantize_rows(weight, scales, num_bits=num_bits, group_size=group_size)
        return replace(_linear_map(tensors, weight, format), bias=linear.bias)

    gate = None if part.gate is None else rounded(part.gate)
    return replace(part, up=rounded(part.up), gate=gate, down=rounded(part.down))


def _linear_map(tensors: dict[str, Tensor], weight: Tensor, format: Integer) -> LinearMap:
    return LinearMap(format, tensors, num_columns=weight.shape[1])
