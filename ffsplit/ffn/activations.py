"""The activation functions of FFNs by the names that model configs use, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
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


def activation_named(name: str) -> Activation:
    """The function a config calls `name`. Raises UnsupportedModelError for one not in the table."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedModelError(f"activation {name!r} is not supported (known: {known})") from None
