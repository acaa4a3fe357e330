"""Forward passes that are replayed as CUDA graphs: one launch instead of one for every kernel.

A GPU that reads a few thousand tokens waits for the CPU to launch its kernels. A narrower FFN launches as
many, so without graphs it is hardly faster. A graph is of one shape of inputs, and of the weights where they
are in memory.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ffsplit.errors import ConfigError, UnsupportedModelError

WARM_UPS = 3
"""Calls before a capture: libraries allocate their workspaces, and Triton compiles, in the first ones."""
MASK = "attention_mask"


@dataclass(frozen=True)
class Capture:
    """A graph, and the tensors that it reads and writes."""

    graph: Any
    inputs: dict[str, Tensor]
    outputs: list[Tensor | None]
    structure: Any

    def replay(self, inputs: dict[str, Tensor]) -> Any:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        copies = [None if output is None else output.clone() for output in self.outputs]
        return pytree.tree_unflatten(copies, self.structure)


class ReplayedForward:
    """A model's forward method. It captures one graph per shape of inputs and keeps the `most` last used.

    Rows without padding are read without a mask, which lets torch take flash attention; to know that, it
    waits for the mask. With gradients, and for inputs on the CPU, it is the model's own method. One thread
    computes at a time.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model, self._most = model, most
        self._signature = inspect.signature(type(model).forward)
        self._captures: OrderedDict[Hashable, Capture] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None

    def __reduce__(self) -> Any:
        """A copy captures its own graphs."""
        return ReplayedForward, (self._model, self._most)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        arguments = self._arguments(positional, named)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        on_gpu = tensors and all(tensor.is_cuda for tensor in tensors.values())
        if not on_gpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return type(self._model).forward(self._model, *positional, **named)
        constants = {name: value for name, value in arguments.items() if name not in tensors}
        if MASK in tensors and tensors[MASK].dim() == 2 and bool(tensors[MASK].all()):
            del tensors[MASK]
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._capture(tensors, constants).replay(tensors)

    def _arguments(self, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        if not positional:
            return named
        bound = self._signature.bind_partial(self._model, *positional, **named)
        arguments: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            is_rest = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            arguments |= value if is_rest else {name: value}
        return arguments

    def _capture(self, tensors: dict[str, Tensor], constants: dict[str, Any]) -> Capture:
        """The graph of these inputs, captured if there is none yet."""
        key = self._key(tensors, constants)
        if key in self._captures:
            self._captures.move_to_end(key)
            return self._captures[key]
        made = self._captures[key] = self._captured(tensors, constants)
        if len(self._captures) > self._most:
            self._captures.popitem(last=False)
        return made

    def _key(self, tensors: dict[str, Tensor], constants: dict[str, Any]) -> Hashable:
        """What a graph depends on: shapes, other arguments, the model's state, and where its weights are."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        attention = getattr(getattr(self._model, "config", None), "_attn_implementation", None)
        first = next(self._model.parameters()).data_ptr()
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return shapes, repr(constants), attention, self._model.training, first, autocast

    def _captured(self, tensors: dict[str, Tensor], constants: dict[str, Any]) -> Capture:
        inputs = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in tensors.items()}
        forward = type(self._model).forward
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(next(iter(inputs.values())).device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    _check(forward(self._model, **inputs, **constants))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                made = forward(self._model, **inputs, **constants)
        outputs, structure = pytree.tree_flatten(made)
        return Capture(graph, inputs, outputs, structure)


def _check(outputs: Any) -> None:
    """Raise UnsupportedModelError if a forward pass returns what cannot be copied, such as a cache."""
    for each in pytree.tree_leaves(outputs):
        if not isinstance(each, Tensor | None):
            raise UnsupportedModelError(
                f"CUDA graphs need a forward pass that returns tensors, and this one returns a "
                f"{type(each).__name__}: pass use_cache=False, or leave them off for generate"
            )


def use_cuda_graphs(model: nn.Module, *, most: int = 32) -> nn.Module:
    """Let a model on a GPU replay its forward passes as CUDA graphs, and return it.

    `most` is the number of input shapes that are kept; pad texts to a few lengths to stay below it. Outputs
    are those of the model. Call it again after replacing some of its weights. Raises ConfigError if the model
    is not on a GPU, and its forward method UnsupportedModelError if it returns more than tensors.
    """
    if not all(parameter.is_cuda for parameter in model.parameters()):
        raise ConfigError("CUDA graphs need a model on a GPU: call its .to('cuda') first")
    model.forward = ReplayedForward(model, most)
    return model
