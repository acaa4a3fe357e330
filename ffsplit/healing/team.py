"""Who works on which share of a training step: this process on all of them, or one process on each.

A step's rows are divided into `size` shares. Their results are summed in the shares' order, whichever
process computed them. So the same number of shares gives the same bytes in one process and in many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Elements of a sum that are exchanged at once, to bound the memory for the other processes' values."""


class Team(Protocol):
    """The processes that train one model together."""

    @property
    def size(self) -> int:
        """How many shares there are."""
        ...

    @property
    def mine(self) -> Sequence[int]:
        """The shares that this process works on."""
        ...

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        """The sum over all shares, in their order. Each process passes the values of its own shares."""
        ...


class Alone:
    """Every share in this process, one after the other."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.mine = range(size)

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        total, *others = values
        for value in others:
            total = total + value
        return total


class Together:
    """One share per process, over torch.distributed's process group."""

    def __init__(self) -> None:
        from torch import distributed

        self.size = distributed.get_world_size()
        self.mine = (distributed.get_rank(),)

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        from torch import distributed

        (mine,) = values
        sums = []
        for chunk in torch.split(mine.contiguous().view(-1), CHUNK_ELEMENTS):
            everyones = [torch.empty_like(chunk) for _ in range(self.size)]
            distributed.all_gather(everyones, chunk)
            sums.append(Alone(self.size).sum(everyones))
        return torch.cat(sums).view_as(mine)


def find_team(size: int) -> Team:
    """The processes that were started together, or this process alone with every share."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        team = Together()
        assert team.size == size, f"{team.size} processes for {size} shares"
        return team
    return Alone(size)
