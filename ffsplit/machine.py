"""This machine: the cores, memory and disk that this process may use, its speed, and its description."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from ffsplit.errors import ConfigError
from ffsplit.store.manifest import Environment

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MATRIX_SIZE = 768


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and the CPU quotas of its control groups.

    Rounded down, at least 1: threads beyond a quota would be throttled in every period.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Linux
        allowed = os.cpu_count() or 1
    return max(1, int(min([float(allowed), *_cpu_quotas()])))


def num_workers_here(requested: int | None, *, threads: int, on_gpu: bool) -> int:
    """How many workers with `threads` threads to run at once here: at most one thread per usable core.

    More workers would only share the cores, and each would load the model. Workers on GPUs mostly wait for
    the GPU, so as many run as are requested.
    """
    cores = max(1, usable_cores() // threads)
    if requested is None:
        return cores
    return requested if on_gpu else min(requested, cores)


def memory_limit_bytes() -> int:
    """The memory of this machine, or of this process's container if that is less."""
    import psutil

    return min([int(psutil.virtual_memory().total), *_memory_limits()])


def return_freed_memory() -> None:
    """Give freed memory back to the system. Takes milliseconds.

    The GNU C library keeps it in pieces, many of which nothing fits into again: 0.1 GB of the 0.9 GB in which
    a small model's run with a search stays.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class GPUs(NamedTuple):
    """The GPUs that this process may use."""

    number: int
    smallest_bytes: int


def gpus_here() -> GPUs | None:
    """This machine's GPUs; None if torch finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    sizes = [torch.cuda.get_device_properties(each).total_memory for each in range(torch.cuda.device_count())]
    return GPUs(len(sizes), min(sizes))


def _memory_limits() -> Iterator[int]:
    for folder in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit():
                yield int(text)


def oom_kills() -> int:
    """How many processes the kernel has killed for memory: in this process's control group, or here at all.

    0 if the kernel does not tell. Only an increase means something.
    """
    for folder in _control_groups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            if (number := _counter(folder / name, "oom_kill")) is not None:
                return number
    return _counter(Path("/proc/vmstat"), "oom_kill") or 0


def _counter(path: Path, name: str) -> int | None:
    """A number in a file of lines with a name and a number."""
    found = [line.split() for line in _read(path).splitlines()]
    return next((int(parts[1]) for parts in found if parts[:1] == [name] and parts[1:]), None)


def _cpu_quotas() -> Iterator[float]:
    """Quotas in cores: `cpu.max` of cgroup v2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of v1."""
    for folder in _control_groups("cpu"):
        for text in (
            _read(folder / "cpu.max"),
            f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}",
        ):
            quota, _, period = text.partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 are no limit
                yield int(quota) / int(period)


def _control_groups(controller: str) -> Iterator[Path]:
    """This process's control group and its parents, any of which may set a limit.

    In a container the path may be the host's, and only the mounted root exists.
    """
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in (CGROUPS / controllers, CGROUPS / controller) if controllers else (CGROUPS,):
            group = root / path.lstrip("/")
            for folder in [group, *group.parents]:
                yield folder
                if folder == root:
                    break


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that a path is on, or would be."""
    return shutil.disk_usage(_existing(path)).free


def device_of(path: Path) -> int:
    """The number of the device that a path is on, or would be."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    """A path, or its nearest existing parent."""
    candidates = (path.absolute(), *path.absolute().parents)
    return next(each for each in candidates if os.path.exists(each))


def bytes_below(path: Path) -> int:
    """The size of all files below a directory; 0 if it does not exist."""
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found += (Path(folder) / name).stat().st_size
            except OSError:  # removed meanwhile
                continue
    return found


def check_device(device: str, dtype: str) -> None:
    """Raise ConfigError if this machine has no such --device, or the device does not support the --dtype."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU on this machine")
    if not computes_in(device, dtype):
        name = torch.cuda.get_device_name() if device == "cuda" else "this machine's CPU"
        raise ConfigError(f"--dtype {dtype}: {name} does not support it: use --dtype float32")


def computes_in(device: str, dtype: str) -> bool:
    """Whether a device multiplies matrices of a dtype natively, found by trying it."""
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
    """Whether a device has instructions for bfloat16 products, which are faster than float32."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@cache
def operations_per_second(device: str, dtype: str) -> float:
    """Floating-point operations per second of a matrix product with this process's threads, measured."""
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


# The versions and hardware of a run.

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("ffsplit", "torch", "transformers", "ray", "numpy", "pyarrow", "safetensors", "tokenizers")


def package_versions() -> dict[str, str]:
    """The versions of everything that can change a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # run from a source tree, or without Ray
            versions[name] = metadata.version(name)
    return versions


def describe_environment() -> Environment:
    """Versions and hardware of this process."""
    return Environment(versions=package_versions(), hardware=describe_hardware())


def describe_hardware() -> dict[str, str | int]:
    """The system, processor, cores, memory in bytes and GPU that this process may use."""
    import torch

    hardware: dict[str, str | int] = {
        "system": platform.platform(),
        "processor": _processor(),
        "num_cpus": usable_cores(),
        "memory_bytes": memory_limit_bytes(),
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def where_it_runs() -> str:
    """This process and its GPUs: host, process, and the name, index and id of each."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    cards = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        index = visible[number] if number < len(visible) and visible[number] else str(number)
        cards.append(f"{found.name} {index} (GPU-{found.uuid})")
    return f"{socket.gethostname()}, process {os.getpid()}: {', '.join(cards) or 'no GPU'}"


def hardware_fingerprint(device: str) -> dict[str, str | int]:
    """What latencies depend on: a table with another fingerprint is refused. `device` is "cpu" or "cuda"."""
    named = device
    if device == "cuda":
        import torch

        named = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": _processor(),
        "num_cpus": usable_cores(),
        "torch": metadata.version("torch"),
        "device": named,
    }


def _processor() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
