"""Hooks that watch every FFN of a model while it reads calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.errors import CalibrationError
from ffsplit.models.architectures import Architecture

CHUNK_TOKENS = 256
"""Rows of activations looked at together on a CPU: few enough to stay in its cache for all the sums."""


class _NeuronSums:
    """Running sums of one layer's neuron activations, in float64 on the model's device."""

    def __init__(self, down_weight_DN: Tensor) -> None:
        def zeros() -> Tensor:
            return torch.zeros(down_weight_DN.shape[1], dtype=torch.float64, device=down_weight_DN.device)

        self.down_norm = down_weight_DN.double().norm(dim=0)
        self.num_tokens = 0
        self.sum_abs, self.sum, self.sum_squares, self.max_abs, self.num_active = (zeros() for _ in range(5))

    def add(self, activation_TN: Tensor, *, tokens: Tensor | None) -> None:
        """Add the rows at these positions, all of them when None."""
        count = len(activation_TN) if tokens is None else len(tokens)
        step = CHUNK_TOKENS if activation_TN.device.type == "cpu" else count
        self.num_tokens += count
        for start in range(0, count, max(1, step)):
            stop = start + step
            if tokens is None:
                self._add(activation_TN[start:stop].float())
            else:
                self._add(activation_TN.index_select(0, tokens[start:stop]).float())

    def _add(self, a_TN: Tensor) -> None:
        """Column sums as products with a vector of ones, which is what processors do best."""
        ones_T = torch.ones(len(a_TN), device=a_TN.device)
        self.sum += ones_T @ a_TN
        absolute_TN = a_TN.abs()
        self.sum_abs += ones_T @ absolute_TN
        self.max_abs = torch.maximum(self.max_abs, absolute_TN.amax(0).double())
        self.sum_squares += ones_T @ absolute_TN.square_()
        self.num_active += ones_T @ torch.gt(a_TN, 0, out=absolute_TN)

    def result(self) -> NeuronStats:
        def array(values: Tensor) -> Any:
            return values.cpu().numpy()

        return NeuronStats(
            num_tokens=self.num_tokens,
            sum_abs=array(self.sum_abs),
            sum=array(self.sum),
            sum_squares=array(self.sum_squares),
            max_abs=array(self.max_abs),
            num_active=array(self.num_active.long()),
            down_norm=array(self.down_norm),
        )


def _down_weight(block: nn.Module, architecture: Architecture) -> Tensor:
    weight = block.get_submodule(architecture.down).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


class FFNObserver:
    """Collects neuron statistics, and a sample of the FFN inputs, of every layer of a base model.

    Use as a context manager around the forward passes, and call `next_batch` before each. Token
    positions are counted over the non-padding tokens of all batches, in order; `sampled` are the
    ascending positions whose FFN inputs are kept. `inputs_only` collects no statistics. `layers` are
    the layers to watch, all of them when None.
    """

    def __init__(
        self,
        base_model: nn.Module,
        architecture: Architecture,
        *,
        sampled: Tensor,
        inputs_only: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        blocks = base_model.get_submodule(architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.layers = range(len(blocks)) if layers is None else layers
        self._handles: list[Any] = []
        self._blocks, self._row = blocks, architecture
        self._sampled, self._inputs_only = sampled, inputs_only
        self._start = self._stop = 0
        self._token_rows: Tensor | None = None
        self._sums = {layer: _NeuronSums(_down_weight(blocks[layer], architecture)) for layer in self.layers}
        self._inputs: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    def __enter__(self) -> FFNObserver:
        for layer in self.layers:
            block = self._blocks[layer]
            up, down = block.get_submodule(self._row.up), block.get_submodule(self._row.down)
            self._handles.append(up.register_forward_pre_hook(self._input_hook(layer)))
            if not self._inputs_only:
                self._handles.append(down.register_forward_pre_hook(self._activation_hook(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def next_batch(self, attention_mask: Tensor) -> None:
        """Announce the batch about to be run by its mask [rows, length]; padding is never counted."""
        rows = attention_mask.flatten().nonzero().flatten()
        self._token_rows = None if len(rows) == attention_mask.numel() else rows
        self._start = self._stop
        self._stop += len(rows)

    @property
    def batch_is_sampled(self) -> bool:
        """Whether any input of the announced batch is to be kept."""
        first, last = self._sampled_range()
        return first < last

    def _sampled_range(self) -> tuple[int, int]:
        bounds = torch.tensor([self._start, self._stop])
        first, last = torch.searchsorted(self._sampled, bounds).tolist()
        return first, last

    def _activation_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._sums[layer].add(arguments[0].detach().flatten(0, -2), tokens=self._token_rows)

        return hook

    def _input_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            first, last = self._sampled_range()
            if first < last:
                rows = (self._sampled[first:last] - self._start).to(arguments[0].device)
                rows = rows if self._token_rows is None else self._token_rows[rows]
                self._inputs[layer].append(arguments[0].detach().flatten(0, -2)[rows].cpu())

        return hook

    def statistics(self) -> tuple[NeuronStats, ...]:
        """The statistics of every watched layer.

        Raises CalibrationError when one missed a token or is not finite.
        """
        for layer, sums in self._sums.items():
            if sums.num_tokens != self._stop:
                raise CalibrationError(
                    f"layer {layer} saw {sums.num_tokens} of {self._stop} tokens: "
                    "the model bypasses the hooks on its FFN"
                )
            if not bool(torch.isfinite(sums.sum_squares).all()):
                raise CalibrationError(
                    f"layer {layer} has activations that are not finite: look for NaN or infinite weights, "
                    "or compute in a wider --dtype"
                )
        return tuple(sums.result() for sums in self._sums.values())

    def inputs(self) -> Sequence[Tensor]:
        """The sampled FFN inputs of every watched layer, [T, D] in the model's dtype."""
        return [torch.cat(parts) for parts in self._inputs.values() if parts]
