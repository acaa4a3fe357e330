"""The module that runs the split experts of one block inside a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffsplit.runtime.split_ffn import SplitFFN


class SplitExperts(nn.Module):
    """A block's experts, each a split FFN of its own; it takes the place of the experts' module.

    `guard`, where it has one, is the original's stacked tensor, stored with a shape that cannot match.
    """

    def __init__(self, *, guard: str | None) -> None:
        super().__init__()
        if guard is not None:
            self.register_buffer(guard, torch.zeros(1))
        self._num_experts = 0

    def append(self, expert: SplitFFN) -> None:
        self.add_module(str(self._num_experts), expert)
        self._num_experts += 1

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of each token's experts, weighted as the router says: [T, D], from [T, D] and [T, k]."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in range(self._num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            if len(tokens):
                found = self.get_submodule(str(expert))(hidden_states[tokens])
                weighted = found * top_k_weights[tokens, slots, None]
                output_TD.index_add_(0, tokens, weighted.to(output_TD.dtype))
        return output_TD
