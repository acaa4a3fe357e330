"""Running sums of one FFN's neuron activations, at a small fraction of the cost of the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffsplit.calibration.statistics import NeuronStats

CHUNK_TOKENS = 256
"""Rows of activations processed together on a CPU: few enough to stay in its cache for all the sums."""


class NeuronSums:
    """The sums, in float64 on the model's device.

    Each chunk is summed in float32 around its own mean. So a small spread around a large mean survives in
    the float64 sums; float32 sums of raw squares would lose it.
    """

    def __init__(self, down_weight_DN: Tensor, expert: int | None) -> None:
        def zeros() -> Tensor:
            return torch.zeros(down_weight_DN.shape[1], dtype=torch.float64, device=down_weight_DN.device)

        self._expert = expert
        self.down_norm = down_weight_DN.double().norm(dim=0)
        self.num_tokens = 0
        self._weighted_norm: Tensor | None = None
        self.sum_abs, self.sum, self.sum_squares, self.max_abs, self.num_active = (zeros() for _ in range(5))

    def add(self, activation_TN: Tensor, *, rows: Tensor | None = None) -> None:
        """Add these rows, all of them when None. An expert that no token was sent to adds none."""
        count = len(activation_TN) if rows is None else len(rows)
        step = max(1, CHUNK_TOKENS if activation_TN.device.type == "cpu" else count)
        self.num_tokens += count
        for start in range(0, count, step):
            if rows is None:
                self._add(activation_TN[start : start + step].float())
            else:
                self._add(activation_TN.index_select(0, rows[start : start + step]).float())

    def _add(self, a_TN: Tensor) -> None:
        """Column sums are products with a vector of ones, because processors run these fastest."""
        ones_T = torch.ones(len(a_TN), device=a_TN.device)
        centre_N = (ones_T @ a_TN).div_(len(a_TN))
        scratch_TN = a_TN - centre_N
        beyond_N, centre_N = (ones_T @ scratch_TN).double(), centre_N.double()
        total_N = centre_N * len(a_TN) + beyond_N
        self.sum += total_N
        self.sum_squares += (ones_T @ scratch_TN.square_()).double() + centre_N * (total_N + beyond_N)
        absolute_TN = torch.abs(a_TN, out=scratch_TN)
        self.sum_abs += ones_T @ absolute_TN
        self.max_abs = torch.maximum(self.max_abs, absolute_TN.amax(0).double())
        self.num_active += ones_T @ torch.gt(a_TN, 0, out=absolute_TN)

    def add_outputs(self, output_TD: Tensor, weight_T: Tensor) -> None:
        """Add the norms of an expert's outputs, times the router's weights."""
        total = output_TD.float().norm(dim=1).double() @ weight_T.double()
        self._weighted_norm = total if self._weighted_norm is None else self._weighted_norm + total

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
            expert=self._expert,
            sum_weighted_norm=None if self._weighted_norm is None else float(self._weighted_norm),
        )
