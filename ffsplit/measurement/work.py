"""How much a model's linear layers multiply and read: what a speed-up can come to at most."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ffsplit.runtime.integer_map import IntegerMap
from ffsplit.runtime.split_ffn import DenseMap, LowRankMap

FEW_TOKENS = 8
"""Below this many tokens a product waits for its weights, not for its multiplications."""


class Work(NamedTuple):
    """Multiplications a token, and bytes of weights, of all linear layers."""

    multiplications: int
    weight_bytes: int


def work_of(model: Any) -> Work:
    """The work of a loaded model, dense or split."""
    each = [_of_module(module) for module in model.modules()]
    return Work(sum(work.multiplications for work in each), sum(work.weight_bytes for work in each))


def _of_module(module: nn.Module) -> Work:
    if isinstance(module, IntegerMap):
        count = module.num_rows * module.num_columns
        return Work(count, module.size_bytes)
    if isinstance(module, nn.Linear | DenseMap):
        matrices = [module.weight]
    elif isinstance(module, LowRankMap):
        matrices = [module.left, module.right]
    elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
        matrices = [module.weight]  # type: ignore[list-item]
    else:
        return Work(0, 0)
    count = sum(matrix.numel() for matrix in matrices)
    return Work(count, sum(matrix.numel() * matrix.element_size() for matrix in matrices))
