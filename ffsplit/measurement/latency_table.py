"""Measuring a latency table: one model with random weights, timed with ever narrower FFNs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffsplit.compute_profile import ComputeProfile
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError
from ffsplit.machine import hardware_fingerprint
from ffsplit.measurement.latency import batches_allowed, example_inputs, run_ms
from ffsplit.measurement.size import model_shape
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.fetch import locate_model, model_name
from ffsplit.models.load import random_model
from ffsplit.models.names import base_of
from ffsplit.splitting.latency import LatencyPoint, LatencyTable

FRACTIONS = [Fraction(n, 24) for n in (1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 21, 24)]
"""Of the original width. For the usual widths, all are multiples of 32 or 64, which kernels prefer."""
NUM_ROUNDS = 3
RUNS_A_ROUND = 4


def measure_latency_table(
    model: str,
    *,
    shape: tuple[int, int],
    profile: ComputeProfile,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Time a model's forward pass at a dozen FFN widths, at (rows, tokens per row), on this machine.

    Every round times every width, so that drift affects all alike; a point is the median of all its
    times. Only the model's config is read. Raises ConfigError if the model cannot be compressed, or
    reads fewer tokens than the shape has per row.
    """
    checkpoint = open_checkpoint(locate_model(model, revision=revision).directory)
    longest = checkpoint.max_positions
    if longest is not None and shape[1] > longest:
        raise ConfigError(f"--num-tokens {shape[1]} is more than the model's {longest} positions")
    dense = model_shape(checkpoint)
    widths = table_widths({each.num_neurons for each in dense.shapes})
    with profile.applied():
        loaded = random_model(checkpoint, dtype=getattr(torch, profile.dtype)).to(profile.device)
        with batches_allowed(loaded):
            times = _time_widths(loaded, checkpoint, widths, shape=shape, progress=progress)
    return LatencyTable(
        model=model_name(model),
        model_shape=dense,
        batch_size=shape[0],
        num_tokens=shape[1],
        dtype=profile.dtype,
        num_threads=profile.threads,
        hardware=hardware_fingerprint(profile.device),
        points=tuple(
            LatencyPoint(width=width, ms=round(float(np.median(times[width])), 4)) for width in widths
        ),
    )


def table_widths(originals: set[int]) -> list[int]:
    """The widths to time, ascending, the original last. Raises ConfigError if layers differ in width."""
    if len(originals) != 1:
        raise ConfigError("a latency table needs a model whose FFNs all have the same width")
    (original,) = originals
    return sorted({max(1, round(original * fraction)) for fraction in FRACTIONS})


@torch.inference_mode()
def _time_widths(
    model: Any,
    checkpoint: Checkpoint,
    widths: Sequence[int],
    *,
    shape: tuple[int, int],
    progress: Callable[[int, int], None] | None,
) -> dict[int, list[float]]:
    num_rows, num_tokens = shape
    inputs = example_inputs(model, num_rows=num_rows, num_tokens=num_tokens)
    forward = partial(run_ms, lambda: model(**inputs), on_cuda=model.device.type == "cuda")
    layers = list(_ffns(model, checkpoint))
    times: dict[int, list[float]] = {width: [] for width in widths}
    done = 0
    for round_ in range(NUM_ROUNDS):
        for width in widths if round_ % 2 == 0 else reversed(widths):
            for layer in layers:
                layer.narrow(width)
            forward()
            times[width] += [forward() for _ in range(RUNS_A_ROUND)]
            done += 1
            if progress is not None:
                progress(done, NUM_ROUNDS * len(widths))
    return times


class _FFN:
    """One layer's linear modules, and their original weights."""

    def __init__(self, inputs: Sequence[nn.Linear], down: nn.Linear) -> None:
        self._inputs, self._down = inputs, down
        self._weights = [(linear.weight.data, _bias(linear)) for linear in inputs]
        self._down_weight = down.weight.data

    def narrow(self, width: int) -> None:
        """Leave the first `width` neurons."""
        for linear, (weight_ND, bias_N) in zip(self._inputs, self._weights, strict=True):
            linear.weight.data = weight_ND[:width]
            if bias_N is not None:
                linear.bias.data = bias_N[:width]
        self._down.weight.data = self._down_weight[:, :width].contiguous()


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data


def _ffns(model: Any, checkpoint: Checkpoint) -> Iterator[_FFN]:
    base = base_of(model)
    for ffn in checkpoint.ffns:
        block, paths = base.get_submodule(ffn.block), ffn.paths
        if paths.transposed or paths.fused or paths.experts:
            raise ConfigError(
                f"a latency table needs FFNs of separate linear layers, unlike those of {ffn.name}"
            )
        names = [name for name in (paths.up, paths.gate) if name is not None]
        yield _FFN([block.get_submodule(name) for name in names], block.get_submodule(paths.down))


def check_target(out: str) -> None:
    """Raise ConfigError, before anything is measured, if the file clearly cannot be written."""
    path = user_path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: give a file in a directory that exists")


def write_latency_table(table: LatencyTable, out: str) -> Path:
    """Write a table. Raises ConfigError when the file cannot be written."""
    path = user_path(out)
    try:
        path.write_text(table.model_dump_json(indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    return path
