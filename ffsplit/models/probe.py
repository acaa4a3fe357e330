"""Tells how a module computes its FFN by running it: which activation, which half of fused rows is the gate.

The module's own code runs on a CPU, with small random matrices in place of its own, and the result is
compared with what each known form would give. In float64, since two kinds of GELU differ by 5e-4 at most.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffsplit.compat.transformers import StackedExperts, activation_of
from ffsplit.ffn.activations import (
    ACTIVATIONS,
    Activation,
    activation_named,
    clamped_name,
    gated,
    softcapped_name,
)

_HIDDEN, _NEURONS, _TOKENS = 8, 6, 64
_CLAMPED = ("silu", "quick_gelu", "gelu", "gelu_pytorch_tanh", "relu")


class Gating(NamedTuple):
    """What a module does between its up and its down projection."""

    function: str
    gate: str | None = None
    """The path of the gate's linear map; None if the FFN has none, or keeps it in one matrix with up."""
    gate_half: int = 0
    """Which half of the rows of a fused matrix is the gate."""
    interleaved: bool = False
    adds_input: bool = False
    """Whether the module adds its input to the FFN's output, so that a split FFN cannot replace it."""


def gating_of(module: nn.Module, *, ups: tuple[str, ...], down: str, fused: bool) -> Gating | None:
    """How an FFN's module combines its linear maps, given by paths; None if it is in no known way.

    `ups` is one map, fused or plain, or two, of which either may be the gate.
    """
    with torch.device("cpu"), torch.no_grad():  # the model may be on no device at all
        generator = torch.Generator().manual_seed(0)
        small = copy.deepcopy(module).eval().double()
        maps = {path: _small(2 * _NEURONS if fused else _NEURONS, _HIDDEN, generator) for path in ups}
        maps[down] = _small(_HIDDEN, _NEURONS, generator)
        for path, linear in maps.items():
            small.set_submodule(path, linear)
        x = 4 * torch.randn(1, _TOKENS, _HIDDEN, generator=generator, dtype=torch.float64)
        try:
            found = small(x)
        except Exception:  # a family's own code, which needs sizes or arguments of its own
            return None
        if not isinstance(found, Tensor) or found.shape != x.shape:
            return None
        rows = [maps[path](x) for path in ups]
        for gating, gate, up in _ways(rows, ups, fused=fused):
            for name, activation in activations_of(module):
                output = maps[down](activation(up) if gate is None else gated(activation, gate, up))
                for adds_input in (False, True):
                    wanted = x + output if adds_input else output
                    if torch.allclose(wanted, found.double(), rtol=1e-6, atol=1e-6):
                        return gating._replace(function=name, adds_input=adds_input)
    return None


def function_between(module: nn.Module, *, up: str, down: str) -> str | None:
    """The activation that a module's own code applies between two of its maps; None if it is not known.

    For modules that do more than an FFN, such as scaling its output. All that they have besides is random.
    """
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        small = copy.deepcopy(module).eval()
        hidden: int = module.get_submodule(up).in_features  # type: ignore[assignment]
        small.set_submodule(up, _small(_NEURONS, hidden, generator))
        small.set_submodule(down, _small(hidden, _NEURONS, generator))
        rest = [
            each
            for each in small.modules()
            if each not in (small.get_submodule(up), small.get_submodule(down))
        ]
        for each in rest:
            each.to_empty(device="cpu", recurse=False).double()
            for parameter in each.parameters(recurse=False):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        seen: dict[str, Tensor] = {}
        small.get_submodule(up).register_forward_hook(lambda _, __, y: seen.update(up=y))
        small.get_submodule(down).register_forward_pre_hook(lambda _, x: seen.update(down=x[0]))
        try:
            small(4 * torch.randn(1, _TOKENS, hidden, generator=generator, dtype=torch.float64))
        except Exception:  # a family's own code, which needs sizes or arguments of its own
            return None
        for name, activation in ACTIVATIONS.items() if len(seen) == 2 else ():
            if torch.allclose(activation(seen["up"]), seen["down"].double(), rtol=1e-6, atol=1e-6):
                return name
    return None


def _small(num_rows: int, num_columns: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(num_columns, num_rows, dtype=torch.float64)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return linear


def _ways(
    rows: list[Tensor], ups: tuple[str, ...], *, fused: bool
) -> Iterator[tuple[Gating, Tensor | None, Tensor]]:
    """Each way in which the maps' outputs may be gate and up."""
    if len(rows) == 2:
        for first, second in ((0, 1), (1, 0)):
            yield Gating("", gate=ups[first]), rows[first], rows[second]
    elif not fused:
        yield Gating(""), None, rows[0]
    else:
        for interleaved in (False, True):
            halves = (rows[0][..., ::2], rows[0][..., 1::2]) if interleaved else rows[0].chunk(2, dim=-1)
            for half in (0, 1):
                yield Gating("", gate_half=half, interleaved=interleaved), halves[half], halves[1 - half]


def activations_of(module: Any) -> Iterator[tuple[str, Activation]]:
    """The known activations, and those that clamp, or cap softly, at numbers that a module holds."""
    yield from ACTIVATIONS.items()
    numbers = [value for value in vars(module).values() if isinstance(value, int | float)]
    for limit in sorted({float(value) for value in numbers if value > 1}):
        for shift, is_after in itertools.product((0.0, 1.0), (False, True)):
            for each in _CLAMPED:
                name = clamped_name(each, limit=limit, shift=shift, is_after=is_after)
                yield name, activation_named(name)
    inner = [value for part in module.modules() for value in vars(part).values()]
    caps = sorted({value for value in inner if isinstance(value, float) and 1 < value < torch.inf})
    for name in (softcapped_name(*pair) for pair in itertools.product(caps, repeat=2)):
        yield name, activation_named(name)


def gating_of_experts(experts: Any, form: StackedExperts) -> str | None:
    """The activation of a stack of experts, found by trying those known; None if it is another.

    A gating may clamp gate and up at a limit, which is one of the module's numbers, and add one to up.
    """
    if not form.is_gated:
        return activation_of(experts.act_fn)
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        gate, up = 8 * torch.randn(2, _TOKENS, 16, generator=generator, dtype=torch.float64)
        by_turns = torch.stack([gate, up], dim=-1).flatten(1)
        try:
            expected = experts._apply_gate(by_turns if form.is_interleaved else torch.cat([gate, up], dim=1))
        except Exception:  # a family's own code, of another form
            return None
        for name, activation in activations_of(experts):
            if torch.allclose(gated(activation, gate, up), expected.double(), rtol=1e-6, atol=1e-6):
                return name
    return None
