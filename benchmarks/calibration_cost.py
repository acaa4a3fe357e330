"""What statistics cost beside a plain forward pass of the same batches, shard by shard.

    python -m benchmarks.calibration_cost MODEL --calibration TEXT --device cuda

A run of the recipe `norm-prune` calibrates as always, and each of its shards is then run three more times,
with the hooks and without, in turns. The first shard, which compiles kernels, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

import ffsplit
from ffsplit.calibration import hooks
from ffsplit.calibration.model_inputs import Batch
from ffsplit.calibration.sums import kernel
from ffsplit.run.stages import calibrate

ROUNDS = 3


def seconds(device: torch.device, batches: Iterator[Any]) -> float:
    """Until all batches went through the model and the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in batches:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain(model: Any, batches: Sequence[Batch]) -> Iterator[Any]:
    with torch.no_grad():
        for batch in batches:
            yield model(**batch.to(model.device, dtype=model.dtype).arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--recipe", default="norm-prune")
    parsed = parser.parse_args()
    found: list[tuple[float, float]] = []

    def observe(model: Any, ffns: Any, batches: Sequence[Batch], **options: Any) -> Any:
        device = torch.device(model.device)
        for _ in range(ROUNDS):
            watched = seconds(device, hooks.observe(model, ffns, batches, **options))
            found.append((watched, seconds(device, plain(model, batches))))
        return hooks.observe(model, ffns, batches, **options)

    with (
        tempfile.TemporaryDirectory(prefix="ffsplit-bench-") as out,
        patch.object(calibrate, "observe", observe),
    ):
        ffsplit.calibrate(
            ffsplit.JobConfig(
                model=parsed.model,
                out=out,
                recipe=parsed.recipe,
                calibration=(parsed.calibration,),
                samples=parsed.samples,
                runner="serial",
                device=parsed.device,
            )
        )
    counted = found[ROUNDS:] or found
    watched, alone = (statistics.median(each) for each in zip(*counted, strict=True))
    ratio = statistics.median(one / other for one, other in counted)
    name = torch.cuda.get_device_name() if parsed.device == "cuda" else "CPU"
    with_kernel = parsed.device == "cuda" and kernel() is not None
    print(
        f"{name}, {len(counted)} pairs, {'one kernel per FFN' if with_kernel else 'no kernel'}: "
        f"statistics {watched:.3f} s, plain forward {alone:.3f} s per shard, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
