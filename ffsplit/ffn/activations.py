"""The activation functions of FFNs by the names that model configs use, on plain tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.errors import UnsupportedModelError

Activation = Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _clipped_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x).clip(-10, 10)


_tanh_gelu = partial(functional.gelu, approximate="tanh")

OTHER_NAMES = {"gated-gelu": "gelu_new", "gated-relu": "relu", "gated-silu": "silu"}
"""T5 configs' names for the whole FFN, and the activations that they mean."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_python": functional.gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu2": _squared_relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu6": functional.relu6,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
}


@dataclass(frozen=True)
class Clamped:
    """The gating of gpt-oss and others: function(min(gate, limit)) (clamp(up, -limit, limit) + shift)."""

    function: Activation
    limit: float
    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.function(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + self.shift)


@dataclass(frozen=True)
class Softcapped:
    """The gating of Inkling 2: cap(gate) sigmoid(gate) cap(up), where cap(x) is c tanh(x / c)."""

    gate_cap: float
    up_cap: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.gate_cap * torch.tanh(x / self.gate_cap) * torch.sigmoid(x)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self(gate) * self.up_cap * torch.tanh(up / self.up_cap)


def gated(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """The neuron activations of a gated FFN."""
    if isinstance(activation, Clamped | Softcapped):
        return activation.gated(gate, up)
    return activation(gate) * up


def changes_up(name: str) -> bool:
    """Whether a gated FFN of this function is more than function(gate) up, as a split FFN computes it."""
    return "," in name


_SOFTCAPPED = re.compile(r"silu, softcapped at (\S+?) and (\S+)")
_CLAMPED = re.compile(r"(\w+), clamped at (\S+?)(, up \+ 1)?")


def clamped_name(name: str, *, limit: float, shift: float) -> str:
    """`silu, clamped at 7` or `quick_gelu, clamped at 7, up + 1`: what `activation_named` reads."""
    return f"{name}, clamped at {limit:g}" + (", up + 1" if shift else "")


def softcapped_name(gate_cap: float, up_cap: float) -> str:
    """`silu, softcapped at 10 and 20`: what `activation_named` reads."""
    return f"silu, softcapped at {gate_cap:g} and {up_cap:g}"


def activation_named(name: str) -> Activation:
    """The function a config calls `name`. Raises UnsupportedModelError for one not in the table."""
    if match := _CLAMPED.fullmatch(name):
        return Clamped(activation_named(match[1]), limit=float(match[2]), shift=float(bool(match[3])))
    if match := _SOFTCAPPED.fullmatch(name):
        return Softcapped(float(match[1]), float(match[2]))
    try:
        return ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedModelError(f"activation {name!r} is not supported (known: {known})") from None
