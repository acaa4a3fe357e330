"""Second moments that fits divide by, damped until they have an inverse: none of them is singular."""

from __future__ import annotations

import torch
from torch import Tensor

from ffsplit.errors import CalibrationError, explained

RESOLUTION = float(torch.finfo(torch.float32).eps)
"""Eigenvalues below this part of the largest are noise: the activations are known to float32 only."""


def damped_root(moment: Tensor, *, ridge: float, num_ridged: int | None = None) -> Tensor:
    """Lower Cholesky factor [n, n] of a second moment with a ridge of `ridge` times its mean diagonal.

    The rows past `num_ridged` take no ridge. Where the result still has no factor (neurons that never fire,
    fewer tokens than neurons), its eigenvalues are raised to what float32 resolves. Raises CalibrationError
    for a moment that is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise CalibrationError("the sampled inputs or activations of a layer overflow: take other text")
    diagonal = moment.diagonal()
    damping = torch.zeros_like(diagonal)
    damping[:num_ridged] = ridge * diagonal[:num_ridged].mean()
    matrix = moment + damping.diag()
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return root
    with explained("the second moment of a layer's activations has no inverse", kind=CalibrationError):
        values, vectors = torch.linalg.eigh(matrix)
        largest = float(values[-1])
        raised = values.clamp(min=RESOLUTION * largest) if largest > 0 else torch.ones_like(values)
        whole = (vectors * raised) @ vectors.T
        root = torch.linalg.cholesky((whole + whole.T) / 2)
    return root
