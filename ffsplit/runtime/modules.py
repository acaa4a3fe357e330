"""The modules that run compressed FFNs inside a transformers model."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.ffn.shapes import FFNShape, Format, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.models.family import WIDTH_WORDS, FFNPaths, Stack
from ffsplit.runtime.quantized_linear import INITIALIZED, QuantizedLinear, share_inputs

# Narrowing an FFN of a transformers model: the same modules, with fewer neurons.


def narrow_ffn(block: nn.Module, paths: FFNPaths, width: int) -> None:
    """Give a block's FFN `width` neurons. Its weights are uninitialized afterwards, and to be loaded."""
    ups = dict.fromkeys(each for each in (paths.up, paths.gate) if each is not None)
    for path in (*ups, *matching(block, paths.adapters)):
        rows = 2 * width if paths.fused else width
        _resize(block.get_submodule(path), rows=rows, transposed=paths.transposed)
    _resize(block.get_submodule(paths.down), columns=width, transposed=paths.transposed)
    for path in paths.per_neuron:
        _narrow(block.get_submodule(path), width)


def _narrow(module: Any, width: int) -> None:
    """Give a depthwise convolution, or a batch norm, `width` channels."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, _empty_like(parameter, (width, *parameter.shape[1:])))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim():  # not a count of batches
            setattr(module, name, buffer.new_empty((width, *buffer.shape[1:])))
    for name in ("in_channels", "out_channels", "groups", "num_features"):
        if hasattr(module, name):
            setattr(module, name, width)


def matching(block: nn.Module, pattern: str | None) -> list[str]:
    """The paths of a block's modules that match a pattern with `*` for numbers."""
    if pattern is None:
        return []
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [path for path, _ in block.named_modules() if regex.fullmatch(path)]


def narrow_experts(experts: nn.Module, stack: Stack, width: int) -> None:
    """Give `width` neurons to all experts that a module stacks. Their weights are to be loaded.

    The module's own code runs them, and may know their width.
    """
    _, hidden, before = stack.sides(experts.get_parameter(stack.down).shape, is_down=True)
    for path in (stack.up, stack.gate, stack.down):
        if path is None:
            continue
        parameter = experts.get_parameter(path)
        is_down = path == stack.down
        num_experts, rows, _ = stack.sides(parameter.shape, is_down=is_down)
        wide = width if is_down else width * rows // before
        _replace(experts, path, stack.shape(num_experts, wide, hidden, is_down=is_down))
        if not is_down and hasattr(experts, f"{path}_bias"):
            _replace(experts, f"{path}_bias", (num_experts, wide))
    for part in experts.modules():
        for name, value in vars(part).items():
            if value == before and WIDTH_WORDS.search(name):
                setattr(part, name, width)


def _replace(module: nn.Module, path: str, shape: tuple[int, ...]) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, _empty_like(module.get_parameter(path), shape))


def _resize(
    linear: Any, *, rows: int | None = None, columns: int | None = None, transposed: bool = False
) -> None:
    """Change the outputs or inputs of an nn.Linear, or of transformers' Conv1D (`transposed`)."""
    weight = linear.weight
    shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
    shape = (rows or shape[0], columns or shape[1])
    linear.weight = _empty_like(weight, shape[::-1] if transposed else shape)
    if rows is not None and linear.bias is not None:
        linear.bias = _empty_like(linear.bias, (rows,))
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, size in zip(names, shape, strict=True):
        setattr(linear, name, size)


def _empty_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


class DenseLinear(nn.Module):
    """y = W x + bias."""

    _is_hf_initialized = INITIALIZED

    def __init__(self, num_rows: int, num_columns: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, num_columns))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias if plus is None else plus)


class LowRankLinear(nn.Module):
    """y = left (right x) + bias: the small side first."""

    _is_hf_initialized = INITIALIZED

    def __init__(self, num_rows: int, num_columns: int, *, rank: int, bias: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(num_rows, rank))
        self.right = nn.Parameter(torch.empty(rank, num_columns))
        self.bias = nn.Parameter(torch.empty(num_rows)) if bias else None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return linear(linear(x, self.right, None), self.left, self.bias if plus is None else plus)


def linear(x: Tensor, weight: Tensor, plus: Tensor | None) -> Tensor:
    """x W^T + plus in one product, in W's dtype. `plus` is a bias or a tensor of the output's shape."""
    x, plus = x.to(weight.dtype), None if plus is None else plus.to(weight.dtype)
    if plus is None or plus.dim() == 1:
        return functional.linear(x, weight, plus)
    rows = torch.addmm(plus.reshape(-1, plus.shape[-1]), x.reshape(-1, x.shape[-1]), weight.t())
    return rows.view(plus.shape)


def build_linear(format: Format, num_rows: int, num_columns: int, *, bias: bool) -> nn.Module:
    """An empty linear layer."""
    if isinstance(format, LowRank):
        return LowRankLinear(num_rows, num_columns, rank=format.rank, bias=bias)
    if isinstance(format, Integer):
        return QuantizedLinear(format, num_rows, num_columns, bias=bias)
    return DenseLinear(num_rows, num_columns, bias=bias)


class _Borrowed(nn.Module):
    """Runs a module that another one owns: its tensors have one name in a state dict."""

    _is_hf_initialized = INITIALIZED

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._lent = (module,)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._lent[0](x)
        return y


class FFNPartModule(nn.Module):
    """The sum over one part's neurons, added to `plus`."""

    _is_hf_initialized = INITIALIZED

    def __init__(self, layout: PartLayout, shape: FFNShape, activation: nn.Module) -> None:
        super().__init__()
        n, d = layout.num_neurons, shape.hidden_size
        self.gate_up = self.gate = self.up = None
        if layout.is_fused:
            self.gate_up = build_linear(layout.up, 2 * n, d, bias=shape.up_bias)
        else:
            self.up = build_linear(layout.up, n, d, bias=shape.up_bias)
            if layout.gate is not None:
                self.gate = build_linear(layout.gate, n, d, bias=shape.up_bias)
        self.down = build_linear(layout.down, d, n, bias=False)
        first = self.up if self.gate is None else self.gate
        self.activation: nn.Module | None = None  # None if the first linear layer applies it itself
        if isinstance(first, QuantizedLinear):
            first.activation = activation
        else:
            self.activation = activation

    @property
    def first_linears(self) -> tuple[nn.Module, ...]:
        """The linear layers that take the part's inputs."""
        return tuple(each for each in (self.gate_up, self.gate, self.up) if each is not None)

    def forward(self, x: Tensor, plus: Tensor | None) -> Tensor:
        output: Tensor = self.down(self._hidden(x), plus)
        return output

    def _hidden(self, x: Tensor) -> Tensor:
        """Neuron activations, the input of the down projection."""
        if self.gate_up is not None:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
        else:
            assert self.up is not None
            if self.gate is None:
                return self._activated(self.up(x))
            gate, up = self.gate(x), self.up(x)
        product: Tensor = self._activated(gate) * up
        return product

    def _activated(self, y: Tensor) -> Tensor:
        if self.activation is None:
            return y
        activated: Tensor = self.activation(y)
        return activated


class SplitFFN(nn.Module):
    """FFN(x) = heavy(x) + light(x) + bias. The products themselves accumulate the sum.

    It may hold a guard: a tensor with the original name of one of the FFN's weights and a shape that
    cannot match. Then a load without ffsplit fails instead of starting from random weights. `trained` is the
    original name of a trained activation, whose parameters keep it.
    """

    _is_hf_initialized = INITIALIZED

    def __init__(
        self,
        layout: LayerLayout,
        shape: FFNShape,
        activation: nn.Module,
        *,
        guard: str | None = None,
        trained: str | None = None,
    ) -> None:
        super().__init__()
        if trained is not None:
            owner, name = _owner(self, trained)
            owner.add_module(name, activation)
            activation = _Borrowed(activation)
        heavy, light = (
            None if part is None else FFNPartModule(part, shape, activation)
            for part in (layout.heavy, layout.light)
        )
        self.heavy, self.light = heavy, light
        share_inputs(each for part in (heavy, light) if part is not None for each in part.first_linears)
        self.down_bias = nn.Parameter(torch.empty(shape.hidden_size)) if layout.down_bias else None
        if guard is not None:
            _add_guard(self, guard)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = self.down_bias
        if self.heavy is not None:
            y = self.heavy(x, y)
        if self.light is not None:
            y = self.light(x, y)
        assert y is not None
        return y


def _add_guard(module: nn.Module, path: str) -> None:
    """Give a module a tensor of this name that has a shape that no weight has."""
    owner, name = _owner(module, path)
    owner.register_buffer(name, torch.zeros(1))


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module around a path below another, made if there is none, and the path's last part."""
    *parts, name = path.split(".")
    for part in parts:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, name


def install_split_ffn(block: nn.Module, paths: FFNPaths, split_ffn: nn.Module) -> None:
    """Replace a block's FFN by a split one. Modules around it that it includes become identities."""
    block.set_submodule(paths.split_path, split_ffn)
    if paths.module is None:
        block.set_submodule(paths.down, nn.Identity())
        assert paths.activation is not None, "a row without a module of the FFN names its activation"
        block.set_submodule(paths.activation, nn.Identity())


# The module that runs the split experts of one block inside a transformers model.


class SplitExperts(nn.Module):
    """A block's experts, each a split FFN. It replaces the experts' module.

    `guard`, if given, is the name of the original's stacked tensor, stored with a shape that cannot match.
    """

    def __init__(self, *, guard: str | None) -> None:
        super().__init__()
        if guard is not None:
            _add_guard(self, guard)
        self._num_experts = 0

    def append(self, expert: nn.Module) -> None:
        self.add_module(str(self._num_experts), expert)
        self._num_experts += 1

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of each token's experts with the router's weights: [T, D], from [T, D] and [T, k]."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in range(self._num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            if len(tokens):
                found = self.get_submodule(str(expert))(hidden_states[tokens])
                weighted = found * top_k_weights[tokens, slots, None]
                output_TD.index_add_(0, tokens, weighted.to(output_TD.dtype))
        return output_TD
