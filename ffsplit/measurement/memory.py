"""Peak memory of loading and running a model: on a GPU by its allocator, on the CPU in a new process.

`python -m ffsplit.measurement.memory DIRECTORY CLASS ROWS TOKENS DEVICE DTYPE OPTIONS` prints the bytes;
OPTIONS is a JSON object of arguments for from_pretrained.
"""

from __future__ import annotations

import ctypes
import gc
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ffsplit.errors import FFSplitError, explained
from ffsplit.models.load_options import attention_options, trusted

PR_SET_PDEATHSIG = 1
WITHIN_S = 7200.0
"""How long loading a model and one forward pass may take."""


def peak_memory_bytes(
    directory: Path, class_name: str, *, shape: tuple[int, int], device: str, dtype: str
) -> int:
    """Peak memory of one load and one forward pass at `shape`.

    On the CPU: peak resident memory above that of the process with its libraries loaded but no model. On
    CUDA: the allocator's peak above what this process holds there.
    """
    options = {"trust_remote_code": trusted(), **attention_options()}
    if device == "cuda":
        with explained(f"measuring the memory of {directory} failed", kind=FFSplitError):
            return _peak_on_gpu(directory, class_name, shape=shape, dtype=dtype, options=options)
    arguments = [str(directory), class_name, *map(str, shape), device, dtype, json.dumps(options)]
    command = [sys.executable, "-m", "ffsplit.measurement.memory", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        raise FFSplitError(
            f"measuring the memory of {directory} took longer than {WITHIN_S:g} s: skip it "
            "(`peak_memory: false` under `measurement` in the recipe, or `ffsplit benchmark --no-memory`)"
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise FFSplitError(f"measuring the memory of {directory} failed: {last}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _peak_on_gpu(
    directory: Path, class_name: str, *, shape: tuple[int, int], dtype: str, options: Mapping[str, Any]
) -> int:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run_once(directory, class_name, shape=shape, device="cuda", dtype=dtype, options=options)
    return torch.cuda.max_memory_allocated() - before


def _run_once(
    directory: Path,
    class_name: str,
    *,
    shape: tuple[int, int],
    device: str,
    dtype: str,
    options: Mapping[str, Any],
) -> None:
    import torch

    from ffsplit.measurement.latency import batches_allowed, example_inputs
    from ffsplit.models.load import load_whole_model

    model = load_whole_model(directory, class_name, dtype=getattr(torch, dtype), **options).to(device)
    inputs = example_inputs(model, num_rows=shape[0], num_tokens=shape[1])
    with torch.inference_mode(), batches_allowed(model):
        model(**inputs)


def _measure(
    directory: str,
    class_name: str,
    rows: str,
    tokens: str,
    device: str,
    dtype: str,
    options: str,
) -> int:
    from ffsplit.measurement import latency  # libraries are not the model's memory
    from ffsplit.models.load import model_class

    assert latency
    where, shape = Path(directory), (int(rows), int(tokens))
    model_class(class_name, where=where)  # nor does the modelling code
    before = _resident_peak_bytes()
    _run_once(where, class_name, shape=shape, device=device, dtype=dtype, options=json.loads(options))
    return _resident_peak_bytes() - before


def _resident_peak_bytes() -> int:
    """The process's peak memory. Not from getrusage, whose value starts at the parent's on Linux."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _die_with_parent() -> None:
    """End this process when its parent is killed, if the system supports that."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    print(json.dumps(_measure(*sys.argv[1:])))
