"""Which versions and which hardware a run took place on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from ffsplit.artifacts.manifest import Environment
from ffsplit.machine import memory_limit_bytes, usable_cores

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
    """Versions, and the processor, the cores, memory in bytes and GPU that this process may use."""
    import torch

    hardware: dict[str, str | int] = {
        "system": platform.platform(),
        "processor": _processor(),
        "num_cpus": usable_cores(),
        "memory_bytes": memory_limit_bytes(),
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return Environment(versions=package_versions(), hardware=hardware)


def hardware_fingerprint(device: str) -> dict[str, str | int]:
    """What a latency depends on and a table of them is refused by: `device` is "cpu" or "cuda"."""
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
