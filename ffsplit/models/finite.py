"""Weights that are NaN or infinite are named, not computed with."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ffsplit.errors import ConfigError
from ffsplit.models.headers import TensorInfo, opened

FLOATS = ("F64", "F32", "F16", "BF16")


def check_finite(name: str, tensor: torch.Tensor, *, where: Path) -> None:
    """Raise ConfigError when a floating-point tensor has a NaN or an infinity. One pass, no copy."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    bounds = torch.aminmax(tensor)
    if not (torch.isfinite(bounds.min) and torch.isfinite(bounds.max)):
        kind = "NaN" if bool(torch.isnan(bounds.min)) else "infinite numbers"
        raise ConfigError(
            f"{where}: tensor {name} holds {kind}: get the checkpoint again, or mend that tensor"
        )


def check_all_finite(directory: Path, tensors: dict[str, TensorInfo]) -> None:
    """Read every floating-point tensor of a checkpoint, one at a time, and check it."""
    for name, tensor in _each(
        directory, ((name, info) for name, info in tensors.items() if info.dtype in FLOATS)
    ):
        check_finite(name, tensor, where=directory)


def _each(directory: Path, wanted: Iterable[tuple[str, TensorInfo]]) -> Iterable[tuple[str, Any]]:
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, info in wanted:
            if info.file not in files:
                files[info.file] = stack.enter_context(opened(directory / info.file, "pt"))
            yield name, files[info.file].get_tensor(name)
