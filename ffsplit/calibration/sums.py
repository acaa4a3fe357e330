"""Running sums of one FFN's neuron activations, at a small fraction of the cost of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ffsplit import logs
from ffsplit.calibration.statistics import NeuronStats

CHUNK_TOKENS = 256
"""Rows of activations processed together on a CPU: few enough to stay in its cache for all the sums."""
MANY_PROGRAMS = 1024
"""Programs of one launch on a GPU: several for each of its processors."""


class NeuronSums:
    """The sums, in float64 on the model's device.

    Each chunk is summed in float32 around its own mean. So a small spread around a large mean survives in
    the float64 sums; float32 sums of raw squares would lose it. On a GPU one kernel does it all, and nothing
    waits for the GPU before `results`.
    """

    def __init__(self, down_weight_DN: Tensor, expert: int | None) -> None:
        self._expert, self._size = expert, down_weight_DN.shape[1]
        self._down_norm = down_weight_DN.double().norm(dim=0)
        self.num_tokens = 0
        self._weighted_norm: Tensor | None = None
        device = self._down_norm.device
        self._kernel = kernel() if device.type == "cuda" else None
        if self._kernel is not None:
            num_groups = 1 if expert is not None else self._kernel.num_groups(self._size)
            self._parts = torch.zeros(num_groups, 5, self._size, dtype=torch.float64, device=device)
            return
        self._totals = torch.zeros(5, self._size, dtype=torch.float64, device=device)
        self._sum_abs, self._sum, self._sum_squares, self._num_active, self._max_abs = self._totals

    def add(self, activation_TN: Tensor, *, rows: Tensor | None = None) -> None:
        """Add these rows, all of them when None. An expert that no token was sent to adds none."""
        count = len(activation_TN) if rows is None else len(rows)
        self.num_tokens += count
        if self._kernel is not None:
            self._kernel(activation_TN, rows, self._parts)
            return
        step = max(1, CHUNK_TOKENS if activation_TN.device.type == "cpu" else count)
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
        self._sum += total_N
        self._sum_squares += (ones_T @ scratch_TN.square_()).double() + centre_N * (total_N + beyond_N)
        absolute_TN = torch.abs(a_TN, out=scratch_TN)
        self._sum_abs += ones_T @ absolute_TN
        torch.maximum(self._max_abs, absolute_TN.amax(0).double(), out=self._max_abs)
        self._num_active += ones_T @ torch.gt(a_TN, 0, out=absolute_TN)

    def add_outputs(self, output_TD: Tensor, weight_T: Tensor) -> None:
        """Add the norms of an expert's outputs, times the router's weights."""
        total = output_TD.float().norm(dim=1).double() @ weight_T.double()
        self._weighted_norm = total if self._weighted_norm is None else self._weighted_norm + total

    def _packed(self) -> Tensor:
        """Everything as one vector of 6 N + 1 numbers, on the device."""
        if self._kernel is not None:
            self._totals = torch.cat([self._parts[:, :4].sum(0), self._parts[:, 4].amax(0, keepdim=True)])
        norm = self._down_norm.new_zeros(1) if self._weighted_norm is None else self._weighted_norm.view(1)
        return torch.cat([self._totals.flatten(), self._down_norm, norm])

    def _unpacked(self, values: Tensor) -> NeuronStats:
        sum_abs, total, sum_squares, num_active, max_abs, down_norm = values[:-1].view(6, self._size)
        return NeuronStats(
            num_tokens=self.num_tokens,
            sum_abs=_array(sum_abs),
            sum=_array(total),
            sum_squares=_array(sum_squares),
            max_abs=_array(max_abs),
            num_active=_array(num_active.long()),
            down_norm=_array(down_norm),
            expert=self._expert,
            sum_weighted_norm=None if self._weighted_norm is None else float(values[-1]),
        )

    @staticmethod
    def results(each: Sequence[NeuronSums]) -> list[NeuronStats]:
        """The statistics of several FFNs on one device, in one transfer."""
        packed = [sums._packed() for sums in each]
        values = torch.split(torch.cat(packed).cpu(), [len(one) for one in packed]) if packed else ()
        return [sums._unpacked(one) for sums, one in zip(each, values, strict=True)]


def _array(values: Tensor) -> Any:
    return values.numpy()


class _Kernel:
    """`sums_cuda.add_sums`, launched."""

    def __init__(self) -> None:
        from ffsplit.calibration import sums_cuda

        self._cuda = sums_cuda

    def num_groups(self, num_neurons: int) -> int:
        """Programs that share the tokens of one batch. Depends on nothing else, and so do the bytes."""
        return max(1, min(64, MANY_PROGRAMS // -(-num_neurons // self._cuda.TILE_NEURONS)))

    def __call__(self, activation_TN: Tensor, rows: Tensor | None, parts: Tensor) -> None:
        num_groups, _, num_neurons = parts.shape
        count = len(activation_TN) if rows is None else len(rows)
        if not count:
            return
        if activation_TN.stride(1) != 1:
            activation_TN = activation_TN.contiguous()
        grid = (-(-num_neurons // self._cuda.TILE_NEURONS), num_groups)
        self._cuda.add_sums[grid](
            activation_TN, activation_TN if rows is None else rows, parts, count, num_neurons,
            activation_TN.stride(0), HAS_ROWS=rows is not None, TOKENS=self._cuda.TILE_TOKENS,
            NEURONS=self._cuda.TILE_NEURONS,
        )  # fmt: skip


@cache
def kernel() -> _Kernel | None:
    """The kernel, if this machine can compile it: Triton needs a C compiler. Found by trying."""
    try:
        found = _Kernel()
        parts = torch.zeros(1, 5, 1, dtype=torch.float64, device="cuda")
        found(torch.ones(1, 1, device="cuda"), None, parts)
    except Exception as error:  # ImportError, or one of Triton's many
        logs.log("statistics without a kernel", reason=f"{type(error).__name__}: {error}".splitlines()[0])
        return None
    return found
