"""How many of a layer's neurons are to be heavy hitters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ffsplit.config import Record
from ffsplit.ffn import MAX_LOSS_TO_ROUNDING, FFNShape, rounded_down


class HeavyRule(Record):
    """Heavy hitters take a share of the layer's budget, or are a fraction of its neurons, or as many
    as hold a share of its output energy."""

    by: Literal["share", "fraction", "energy"]
    value: float = Field(ge=0, le=1)

    def num_wanted(self, shape: FFNShape, *, budget: int, num_energetic: int) -> int:
        """How many neurons the rule asks for, whether or not the budget has room for them.

        `num_energetic` is how many hold `value` of the energy, by the statistics; only a rule by
        energy looks at it.
        """
        if self.value == 0:
            return 0
        if self.by == "energy":
            return num_energetic
        if self.by == "fraction":
            width = max(1, int(self.value * shape.num_neurons + 1e-9))
        else:
            for_neurons = budget - shape.hidden_size * shape.down_bias
            width = max(0, int(self.value * for_neurons)) // shape.elements_per_neuron
        return rounded_down(width, most_lost=MAX_LOSS_TO_ROUNDING * budget / shape.elements_per_neuron)
