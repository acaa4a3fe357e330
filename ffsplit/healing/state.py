"""The state of a healing run as one safetensors file, so that it can go on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class HealingState:
    """How far a run is, and the best weights it has seen. Losses are validation distances."""

    step: int = 0
    first_loss: float = float("inf")
    best_loss: float = float("inf")
    best_step: int = 0
    num_worse: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, weights: dict[str, Tensor], optimizer: Any) -> None:
        """Write the state, the current weights and the optimizer's moments."""
        tensors = {f"weights.{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        facts = {"step": self.step, "best_step": self.best_step, "num_worse": self.num_worse}
        losses = {"first_loss": self.first_loss, "best_loss": self.best_loss}
        metadata = {"state": json.dumps(facts | losses)}
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: Path, weights: dict[str, Tensor], optimizer: Any) -> HealingState:
        """Read a state into the given weights, in place, and into the optimizer."""
        with safe_open(path, framework="pt") as file:
            state = cls(**json.loads(file.metadata()["state"]))
            moments: dict[int, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118
                group, _, name = key.partition(".")
                tensor = file.get_tensor(key)
                if group == "weights":
                    weights[name].data.copy_(tensor)
                elif group == "best":
                    state.best[name] = tensor
                else:
                    index, _, name = name.partition(".")
                    moments.setdefault(int(index), {})[name] = tensor
        loaded = optimizer.state_dict()
        loaded["state"] = moments
        optimizer.load_state_dict(loaded)
        return state
