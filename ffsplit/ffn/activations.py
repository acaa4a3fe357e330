"""The activation functions of FFNs by the names that model configs use, on plain tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
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


# Trained activations. An FFN's neurons share their parameters, so no width changes them.


@dataclass(frozen=True)
class XIELU:
    """Apertus' activation; each parameter is one number. Source: arXiv:2411.13010.

    x > 0: softplus(alpha_p) x² + beta x; else (beta + softplus(alpha_n)) (expm1(min(x, eps)) - x) + beta x.
    """

    alpha_p: Tensor
    alpha_n: Tensor
    beta: Tensor | float = 0.5
    eps: Tensor | float = -1e-6

    def __call__(self, x: Tensor) -> Tensor:
        positive = functional.softplus(self.alpha_p) * x.square()
        eps = self.eps.to(x.dtype) if isinstance(self.eps, Tensor) else x.new_full((), self.eps)
        below = torch.minimum(x, eps)  # `new_full` fills on the device; a copy would wait for it
        negative = (self.beta + functional.softplus(self.alpha_n)) * (below.expm1() - x)
        return torch.where(x > 0, positive, negative) + self.beta * x


@dataclass(frozen=True)
class PReLU:
    """A leaky ReLU with a trained slope [1]. Source: arXiv:1502.01852."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.weight)


TRAINED: dict[str, type[XIELU] | type[PReLU]] = {"xielu": XIELU, "prelu": PReLU}
"""Trained activations by the names that model configs use. Their fields are named as the modules' tensors."""


@dataclass(frozen=True)
class Clamped:
    """The gating of gpt-oss and others: function(min(gate, limit)) (clamp(up, -limit, limit) + shift).

    If `is_after`, the minimum is taken of the function's value: Step 3.7.
    """

    function: Activation
    limit: float
    shift: float
    is_after: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.is_after:
            activated = self.function(gate).clamp(max=self.limit)
        else:
            activated = self.function(gate.clamp(max=self.limit))
        return activated * (up.clamp(-self.limit, self.limit) + self.shift)


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
_CLAMPED = re.compile(r"(\w+), (then )?clamped at (\S+?)(, up \+ 1)?")


def clamped_name(name: str, *, limit: float, shift: float, is_after: bool = False) -> str:
    """`silu, clamped at 7`, `silu, then clamped at 7` or `quick_gelu, clamped at 7, up + 1`.

    This is what `activation_named` reads.
    """
    return f"{name}, {'then ' if is_after else ''}clamped at {limit:g}" + (", up + 1" if shift else "")


def softcapped_name(gate_cap: float, up_cap: float) -> str:
    """`silu, softcapped at 10 and 20`: what `activation_named` reads."""
    return f"silu, softcapped at {gate_cap:g} and {up_cap:g}"


def activation_named(name: str, parameters: Mapping[str, Tensor] | None = None) -> Activation:
    """The function a config calls `name`; `parameters` are those of a trained one, by name.

    Raises UnsupportedModelError for a name that is not in the tables, or if a parameter is missing.
    """
    if match := _CLAMPED.fullmatch(name):
        function, after, limit, shift = match.groups()
        return Clamped(activation_named(function), float(limit), float(bool(shift)), is_after=bool(after))
    if match := _SOFTCAPPED.fullmatch(name):
        return Softcapped(float(match[1]), float(match[2]))
    check_activation(name, parameters or {})
    return TRAINED[name](**(parameters or {})) if name in TRAINED else ACTIVATIONS[name]


def check_activation(name: str, parameters: Collection[str]) -> None:
    """Raise UnsupportedModelError for a name that is not in the tables, or if a parameter is missing."""
    if name in TRAINED:
        needed = [each.name for each in fields(TRAINED[name]) if each.default is MISSING]
        if missing := [each for each in needed if each not in parameters]:
            raise UnsupportedModelError(f"activation {name!r}: the model has no tensor {', '.join(missing)}")
    elif name not in ACTIVATIONS and not _CLAMPED.fullmatch(name) and not _SOFTCAPPED.fullmatch(name):
        known = ", ".join(sorted(ACTIVATIONS.keys() | TRAINED.keys()))
        raise UnsupportedModelError(f"activation {name!r} is not supported (known: {known})")
