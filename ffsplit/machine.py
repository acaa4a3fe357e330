"""What this machine has: memory that may be used, free disk, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import shutil
import time
from functools import cache
from pathlib import Path

from ffsplit.errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")
MATRIX_SIZE = 768


def num_workers_here(requested: int | None, *, threads: int, on_gpu: bool) -> int:
    """How many workers of so many threads to run at once on this machine: one a core at most.

    More would take turns on the cores, each after it has loaded the model. Workers on GPUs wait for
    those, and are as many as are asked for.
    """
    cores = max(1, (os.cpu_count() or 1) // threads)
    if requested is None:
        return cores
    return requested if on_gpu else min(requested, cores)


def memory_limit_bytes() -> int:
    """The memory of this machine, or of the container that this process is in, where that is less."""
    import psutil

    return min([int(psutil.virtual_memory().total), *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """The limits of this process's control group and of those around it; none where there is no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            for name in ("memory.max", "memory.limit_in_bytes"):
                text = _read(folder / name)
                if text.isdigit():
                    limits.append(int(text))
            if folder == root:
                break
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Free disk where a path is, or would be."""
    for existing in (path.absolute(), *path.absolute().parents):
        try:
            return shutil.disk_usage(existing).free
        except OSError:  # not there yet, or no name that a disk takes
            continue
    return 0


def device_of(path: Path) -> int | None:
    """The number of the device that a path is on, or would be."""
    for existing in (path.absolute(), *path.absolute().parents):
        try:
            return existing.stat().st_dev
        except OSError:
            continue
    return None


def bytes_below(path: Path) -> int:
    """The size of all files below a directory; 0 where there is none."""
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found += (Path(folder) / name).stat().st_size
            except OSError:  # removed meanwhile
                continue
    return found


def check_device(device: str, dtype: str) -> None:
    """Raise ConfigError where this machine lacks a device, or the device a dtype: --device and --dtype."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU on this machine")
    if not computes_in(device, dtype):
        name = torch.cuda.get_device_name() if device == "cuda" else "this machine's CPU"
        raise ConfigError(f"--dtype {dtype}: {name} does not compute in it: take --dtype float32")


def computes_in(device: str, dtype: str) -> bool:
    """Whether a device multiplies matrices of a dtype, and not only by way of another dtype; by trying it."""
    import torch

    if (device, dtype) == ("cuda", "bfloat16") and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        return False
    try:
        a = torch.ones(2, 2, dtype=getattr(torch, dtype), device=device)
        return bool((a @ a).float().eq(2).all())
    except RuntimeError:  # "not implemented for ..."
        return False


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products in bfloat16, which take less time than in float32."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@cache
def operations_per_second(device: str, dtype: str) -> float:
    """Floating-point operations of a matrix product, a second, with this process's threads; by trying it."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return float("nan")
    a = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=getattr(torch, dtype), device=device)
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        taken.append(time.perf_counter() - started)
    return float(2 * MATRIX_SIZE**3 / min(taken))
