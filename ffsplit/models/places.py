"""The FFNs that a checkpoint has: which tensors each is made of, and where it sits in the model.

An FFN is the unit of everything that follows: statistics, plans and compressed files are numbered as
`find_ffns` numbers them, tower by tower, block by block, experts in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ffsplit.ffn import FFNShape
from ffsplit.models.rows import FFNPaths, Tower

STACKED = {"up": "gate_up_proj", "gate": "gate_up_proj", "down": "down_proj"}
"""What transformers calls the experts of a block where they are one tensor, below the experts' module."""


class MatrixPlace(NamedTuple):
    """A matrix [out, in] in a file: a tensor, or a part of one."""

    name: str
    bias: str | None = None
    expert: int | None = None
    """Which matrix of a stack it is."""
    half: int | None = None
    """Which half of the rows it is, where gate and up are one tensor: 0 or 1."""
    transposed: bool = False
    alone: str | None = None
    """What a matrix of a stack is called where each is a tensor of its own."""


@dataclass(frozen=True)
class FFNPlace:
    """One FFN of a model. Module paths are relative to the base model."""

    index: int
    name: str
    tower: Tower
    paths: FFNPaths
    block: str
    up: MatrixPlace
    gate: MatrixPlace | None
    down: MatrixPlace
    shape: FFNShape
    expert: int | None = None
    unit: int = 0
    """The index of the first FFN of its experts' module, its own where it is no expert."""

    @property
    def split_path(self) -> str:
        """The module whose place a split FFN takes."""
        return join_paths(self.block, self.paths.split_path)

    @property
    def split_prefix(self) -> str:
        """What the tensors of a split FFN begin with, relative to the base model."""
        return self.split_path if self.expert is None else f"{self.split_path}.{self.expert}"

    @property
    def guard(self) -> str:
        """The module tensor, relative to the base model, that is stored with a shape that cannot match."""
        return f"{self.split_path}.{self.paths.guard}"

    @property
    def matrices(self) -> tuple[MatrixPlace, ...]:
        return tuple(each for each in (self.up, self.gate, self.down) if each is not None)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor it is stored in, each once, weights first."""
        names = [each.name for each in self.matrices] + [each.bias for each in self.matrices if each.bias]
        return tuple(dict.fromkeys(names))

    @property
    def width_key(self) -> tuple[str | None, str | None]:
        """Which field of which part of config.json states its width."""
        return self.tower.config, self.paths.width_field


def join_paths(block: str, path: str) -> str:
    """One path below the other; either may be empty."""
    return f"{block}.{path}" if block and path else block or path
