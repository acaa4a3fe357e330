"""Finds how a module keeps and runs all experts of a block: its tensors, how they lie, how it is called.

transformers marks the usual form. Any other is found by running the module's own code on a CPU, with small
random tensors in place of its own, and comparing the result with what each known form would give.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ffsplit.compat.transformers import stacked_experts
from ffsplit.ffn.activations import activation_named, gated
from ffsplit.models.family import Call, FFNPaths, Stack
from ffsplit.models.probe import activations_of, gating_of_experts

_EXPERTS, _HIDDEN, _NEURONS, _TOKENS = 3, 8, 6, 24
_DOWN = re.compile(r"down|output|wo$|w2$|fc2")
_GATE = re.compile(r"gate|w1$")
_CALLS: dict[int, tuple[Call, ...]] = {1: ("repeated", "grouped"), 2: ("every",), 3: ("routed",)}
"""How a module may be called, by the number of arguments that it needs."""


class FoundStack(NamedTuple):
    """The experts of a block, stacked in tensors of one module."""

    stack: Stack
    num_experts: int
    width: int
    hidden_size: int
    is_gated: bool
    function: str
    gate_half: int = 0
    is_interleaved: bool = False
    narrow_only: bool = False


def stack_of(module: Any) -> FoundStack | None:
    """The experts that a module stacks; None if it stacks none, or runs them in an unknown way."""
    form = stacked_experts(module)
    if form is None:
        return next((found for each in _candidates(module) if (found := _probed(module, each))), None)
    function = gating_of_experts(module, form)
    if function is None:
        return None
    stack = Stack(
        up="gate_up_proj" if form.is_gated else "up_proj",
        transposed=form.is_transposed,
        down_transposed=form.is_transposed,
    )
    num_experts, *sides = module.down_proj.shape
    width, hidden = sides if form.is_transposed else reversed(sides)
    return FoundStack(
        stack,
        num_experts,
        width,
        hidden,
        form.is_gated,
        function,
        is_interleaved=form.is_interleaved,
        narrow_only=form.has_norm,
    )


class _Candidate(NamedTuple):
    """A way in which a module's tensors may be experts; what they compute is still unknown."""

    stack: Stack
    num_experts: int
    width: int
    hidden_size: int
    is_gated: bool


def _candidates(module: nn.Module) -> Iterator[_Candidate]:
    """The ways in which tensors of a module, or of its children, may be experts, by names and shapes."""
    needed = [
        each
        for each in inspect.signature(module.forward).parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    tensors = {
        f"{path}.{name}" if path else name: each
        for path, part in (("", module), *module.named_children())
        for name, each in part.named_parameters(recurse=False)
        if each.dim() > 1 and not re.search(r"router|norm", path)
    }
    downs = [name for name in tensors if _DOWN.search(name.removesuffix(".weight"))]
    if len(tensors) not in (2, 3) or len(downs) != 1 or len(needed) not in _CALLS:
        return
    ups = [name for name in tensors if name not in downs]
    gate = next((name for name in ups if _GATE.search(name)), ups[0]) if len(ups) == 2 else None
    up = next(name for name in ups if name != gate)
    dims = {each.dim() for each in tensors.values()}
    flat = None
    if dims == {2} and isinstance(number := getattr(module, "num_experts", None), int) and number > 1:
        flat = number
    elif dims != {3}:
        return
    for transposed in (False, True):
        for down_transposed in (False, True):
            stack = Stack(
                up=up,
                gate=gate,
                down=downs[0],
                transposed=transposed,
                down_transposed=down_transposed,
                flat=flat,
            )
            sizes = _sizes(tensors, stack)
            if sizes is not None:
                for call in _CALLS[len(needed)]:
                    yield _Candidate(stack.model_copy(update={"call": call}), *sizes)


def _sizes(tensors: dict[str, nn.Parameter], stack: Stack) -> tuple[int, int, int, bool] | None:
    """The number of experts, their width, the hidden size, and whether they are gated; None: no fit."""
    num_experts, hidden, width = stack.sides(tensors[stack.down].shape, is_down=True)
    ups = [stack.sides(tensors[name].shape) for name in (stack.up, stack.gate) if name is not None]
    rows = {each[1] for each in ups}
    if {each[2] for each in ups} != {hidden} or any(each[0] != num_experts for each in ups):
        return None
    if rows == {width}:
        return num_experts, width, hidden, len(ups) == 2
    return (num_experts, width, hidden, True) if rows == {2 * width} and len(ups) == 1 else None


def _probed(module: Any, candidate: _Candidate) -> FoundStack | None:
    """The candidate with its activation, if the module's own code computes it; else None."""
    flat = _EXPERTS if candidate.stack.flat else None
    stack = candidate.stack.model_copy(update={"flat": flat})
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        small = _small(module, candidate._replace(stack=stack), generator)
        x_TD = torch.randn(_TOKENS, _HIDDEN, generator=generator, dtype=torch.float64)
        expert_T = torch.arange(_TOKENS) % _EXPERTS
        try:
            found_TD = _run(small, stack, x_TD, expert_T)
        except Exception:  # a family's own code, of another form
            return None
        if not isinstance(found_TD, Tensor) or found_TD.numel() != x_TD.numel():
            return None
        norms = [each for name, each in small.named_children() if "norm" in name]
        up, gate, down = (
            None if name is None else stack.matrices(small.get_parameter(name), is_down=name == stack.down)
            for name in (stack.up, stack.gate, stack.down)
        )
        assert up is not None and down is not None
        rows_TN = torch.einsum("td,tnd->tn", x_TD, up[expert_T])
        gate_TN = None if gate is None else torch.einsum("td,tnd->tn", x_TD, gate[expert_T])
        for half, interleaved, first, second in _halves(rows_TN, gate_TN, is_gated=candidate.is_gated):
            for name, activation in activations_of(module):
                hidden = activation(second) if first is None else gated(activation, first, second)
                expected_TD = torch.einsum("tn,tdn->td", hidden, down[expert_T])
                for norm in norms:
                    expected_TD = norm(expected_TD)
                if torch.allclose(expected_TD, found_TD.double().reshape(x_TD.shape), rtol=1e-5, atol=1e-6):
                    return FoundStack(
                        *candidate,
                        function=name,
                        gate_half=half,
                        is_interleaved=interleaved,
                        narrow_only=True,
                    )
    return None


def _small(module: Any, candidate: _Candidate, generator: torch.Generator) -> Any:
    """A copy of a module with 3 experts of 6 neurons, for 8 dimensions, random and in float64.

    Experts between which the module itself chooses are equal, so that its choice does not matter.
    """
    stack = candidate.stack
    sizes = {candidate.hidden_size: _HIDDEN, candidate.width: _NEURONS, candidate.num_experts: _EXPERTS}
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        if name in (stack.up, stack.gate, stack.down):
            is_fused = name == stack.up and candidate.is_gated and stack.gate is None
            shape = stack.shape(
                _EXPERTS, 2 * _NEURONS if is_fused else _NEURONS, _HIDDEN, is_down=name == stack.down
            )
        else:
            shape = tuple(sizes.get(size, size) for size in parameter.shape)
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        if stack.call == "grouped" and name in (stack.up, stack.gate, stack.down):
            made[1:] = made[:1]
        elif len(shape) == 1:
            made = torch.full(shape, float("bias" not in name), dtype=torch.float64)
        memo[id(parameter)] = nn.Parameter(made, requires_grad=False)
    small = copy.deepcopy(module, memo).eval()
    for part in small.modules():
        for name, value in vars(part).items():
            if type(value) is int and value in sizes:
                setattr(part, name, sizes[value])
    return small


def _run(small: Any, stack: Stack, x_TD: Tensor, expert_T: Tensor) -> Any:
    """The module's output [T, D] where each token goes to its expert alone, with weight 1."""
    one_TE = torch.nn.functional.one_hot(expert_T, _EXPERTS).to(x_TD.dtype)
    if stack.call == "every":
        return small(x_TD[None], one_TE)
    if stack.call == "grouped":
        return small(x_TD[None])
    if stack.call == "repeated":
        all_ETD = small(x_TD.repeat(_EXPERTS, 1)).view(_EXPERTS, *x_TD.shape)
        return all_ETD[expert_T, torch.arange(len(x_TD))]
    return small(x_TD, expert_T[:, None], torch.ones(len(x_TD), 1, dtype=x_TD.dtype))


def _halves(
    rows_TN: Tensor, gate_TN: Tensor | None, *, is_gated: bool
) -> Iterator[tuple[int, bool, Tensor | None, Tensor]]:
    """Each way in which rows may be gate and up: which half is the gate, whether by turns, gate, up."""
    if gate_TN is not None or not is_gated:
        yield 0, False, gate_TN, rows_TN
        return
    for interleaved in (False, True):
        halves = (rows_TN[..., ::2], rows_TN[..., 1::2]) if interleaved else rows_TN.chunk(2, dim=-1)
        for half in (0, 1):
            yield half, interleaved, halves[half], halves[1 - half]


class ExpertMatrices(NamedTuple):
    """One expert's matrices [out, in], views of its module's tensors."""

    up: Tensor
    gate: Tensor | None
    down: Tensor


def expert_matrices(module: nn.Module, paths: FFNPaths, expert: int) -> ExpertMatrices:
    """The matrices of an expert in the module that runs it."""
    stack = paths.stack
    assert stack is not None
    up = stack.matrices(module.get_parameter(stack.up))[expert]
    gate = None
    if stack.gate is not None:
        gate = stack.matrices(module.get_parameter(stack.gate))[expert]
    elif paths.gate is not None:
        halves = (up[::2], up[1::2]) if paths.interleaved else up.chunk(2)
        gate, up = halves[paths.gate_half], halves[1 - paths.gate_half]
    return ExpertMatrices(up, gate, stack.matrices(module.get_parameter(stack.down), is_down=True)[expert])


def expert_activations(module: Any, paths: FFNPaths, expert: int, x_TD: Tensor, *, default: str) -> Tensor:
    """The neuron activations [T, N] of an expert, by the module's own function if it has one.

    `default` is the activation of its tower.
    """
    stack = paths.stack
    assert stack is not None
    if stack.gate is None and hasattr(module, "_apply_gate"):
        weight, bias = module.get_parameter(stack.up), getattr(module, f"{stack.up}_bias", None)
        y_TN = linear(x_TD, stack.matrices(weight)[expert], None if bias is None else bias[expert])
        activated: Tensor = module.act_fn(y_TN) if paths.gate is None else module._apply_gate(y_TN)
        return activated
    up, gate, _ = expert_matrices(module, paths, expert)
    activation = activation_named(paths.function or default)
    if gate is None:
        return activation(linear(x_TD, up))
    return gated(activation, linear(x_TD, gate), linear(x_TD, up))


def expert_outputs(module: Any, paths: FFNPaths, expert: int, activation_TN: Tensor) -> Tensor:
    """The outputs [T, D] of an expert of a stack for its neurons' activations."""
    assert paths.stack is not None
    bias = getattr(module, f"{paths.stack.down}_bias", None)
    down = expert_matrices(module, paths, expert).down
    return linear(activation_TN, down, None if bias is None else bias[expert])


def own_activations(block: nn.Module, paths: FFNPaths, x_TD: Tensor, *, default: str) -> Tensor:
    """The neuron activations [T, N] of an expert that is a module of its own. `default` is its tower's."""
    activation = activation_named(paths.function or default)
    up_TN = block.get_submodule(paths.up)(x_TD)
    if paths.gate is not None:
        return gated(activation, block.get_submodule(paths.gate)(x_TD), up_TN)
    if not paths.fused:
        return activation(up_TN)
    halves = (up_TN[..., ::2], up_TN[..., 1::2]) if paths.interleaved else up_TN.chunk(2, dim=-1)
    return gated(activation, halves[paths.gate_half], halves[1 - paths.gate_half])


# What a call of the experts' module says: which rows go to which experts.


class Routed(NamedTuple):
    """Hidden states [..., D], the experts [..., k] that each goes to, and with which weights [..., k].

    The weights are None where the call does not state them.
    """

    states: Tensor
    experts: Tensor
    weights: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Routed:
        """The same with each tensor changed."""
        weights = None if self.weights is None else change(self.weights)
        return Routed(change(self.states), change(self.experts), weights)


def called_module(module: nn.Module, stack: Stack) -> nn.Module:
    """The module whose call says which experts run."""
    return module.get_submodule(stack.up.rpartition(".")[0]) if stack.call == "grouped" else module


def by_position(stack: Stack, num_experts: int, arguments: tuple[Any, ...]) -> Routed:
    """What a call says, with a row for each position. Repeated states are [T, E * D], without experts."""
    states = arguments[0]
    numbers = torch.arange(num_experts, device=states.device)
    if stack.call == "repeated":
        all_TD = states.reshape(num_experts, -1, states.shape[-1]).transpose(0, 1).flatten(1)
        return Routed(all_TD, numbers[:0].expand(len(all_TD), 0))
    if stack.call == "grouped":
        sizes = torch.as_tensor(arguments[1], device=states.device)
        return Routed(states, numbers.repeat_interleave(sizes)[:, None])
    if stack.call == "every":
        return Routed(states, numbers.expand(*states.shape[:-1], num_experts))
    weights = arguments[2] if len(arguments) > 2 else None
    is_one_each = isinstance(weights, Tensor) and weights.shape == arguments[1].shape
    return Routed(states, arguments[1], weights if is_one_each else None)


def as_pairs(stack: Stack | None, routed: Routed, num_experts: int) -> Routed:
    """Repeated states [T, E * D] as one row for each that is not zero: the others were not chosen."""
    if stack is None or stack.call != "repeated":
        return routed
    all_TED = routed.states.view(len(routed.states), num_experts, -1)
    tokens, experts = all_TED.any(dim=-1).nonzero(as_tuple=True)
    return Routed(all_TED[tokens, experts], experts[:, None])


def sent_to_modules(runner: nn.Module, experts: Sequence[nn.Module], arguments: tuple[Any, ...]) -> Routed:
    """Which experts [T, E] the module `runner` sends each row of its states [T, D] to; -1 for the others.

    Its own code tells: it is called with each row's number in place of the row, and experts that note them.
    """
    states, *others = arguments
    num_rows = states.shape[:-1].numel()
    numbers = torch.arange(num_rows, device=states.device, dtype=torch.float64)
    chosen_TE = torch.full((num_rows, len(experts)), -1, device=states.device)

    def note(expert: int, rows: Tensor) -> Tensor:
        chosen_TE[rows[..., 0].flatten().long(), expert] = expert
        return rows

    own: Any = [vars(module).get("forward") for module in experts]
    try:
        for expert, module in enumerate(experts):
            vars(module)["forward"] = partial(note, expert)
        runner.forward(numbers.view(*states.shape[:-1], 1).expand(states.shape), *others)
    finally:
        for module, forward in zip(experts, own, strict=True):
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward
    return Routed(states, chosen_TE)
