"""Runs a model with only one block in memory at a time.

The model's own forward runs once per block and batch. Blocks before the loaded one return the output stored
for the batch, and the forward stops as soon as the loaded block has returned. So the family's own code does
everything around the blocks (masks, positions, what passes from block to block), and the result has the
same bytes as with the whole model.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import empty_model, is_made_up, load_tensors
from ffsplit.models.names import base_of

Inputs = Mapping[str, Tensor]


class _Answered(Exception):
    """The loaded block has returned: stop the forward, because the later blocks are not loaded."""


class StreamedModel:
    """A checkpoint's model that holds everything but its blocks, and loads these one at a time.

    `start` takes the batches, as arguments of a forward. Blocks are then loaded in order, and every batch
    runs through each of them. After the last block, `finish` returns the model's own output for a batch;
    `recall` prepares the model for a caller that makes the same call itself. Block outputs are kept in
    unnamed files, which disappear with the process; only the pages in use are in memory. Raises ConfigError
    when a tensor is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        class_name: str | None = None,
    ) -> None:
        self.model = empty_model(checkpoint, class_name=class_name, dtype=dtype)
        self.device, self._dtype, self._checkpoint = device, dtype, checkpoint
        self.base_model = base_of(self.model)
        self.block_paths = checkpoint.blocks
        self.blocks = blocks = [self.base_model.get_submodule(path) for path in self.block_paths]
        self._forwards = [block.forward for block in blocks]
        for index, block in enumerate(blocks):
            block.forward = self._stand_in(index)
            unload(block)
        self._load_rest({parameter for block in blocks for parameter in block.parameters()})
        self._batches: list[Inputs] = []
        self._outputs: list[Any] = []
        self._current = 0
        self._loaded = -1

    def _load_rest(self, in_blocks: set[nn.Parameter]) -> None:
        """Load everything but the blocks."""
        load_outside_blocks(self.model, self._checkpoint, in_blocks, device=self.device, dtype=self._dtype)

    def _load(self, names: Sequence[str]) -> None:
        load_tensors(self.model, self._checkpoint, names, device=self.device, dtype=self._dtype)

    def start(self, batches: Sequence[Inputs]) -> None:
        """Set the batches to run through the blocks from now on."""
        self._batches = list(batches)
        self._outputs = [None] * len(self._batches)
        self._loaded = -1

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Load a block within a `with` block, to run every batch through it."""
        assert index == self._loaded + 1, "blocks are run in their order"
        block = self.blocks[index]
        base = f"{self._checkpoint.prefix}{self.block_paths[index]}."
        self._load(self._checkpoint.block_tensors(self.block_paths[index]))
        absent = [name for name, tensor in block.state_dict().items() if tensor.is_meta]
        if absent:
            raise ConfigError(f"{self._checkpoint.directory} holds no tensor for {base}{absent[0]}")
        self._loaded = index
        try:
            yield block
        finally:
            unload(block)

    @torch.no_grad()
    def advance(self, batch: int) -> Any:
        """Run a batch through the loaded block, and return its output."""
        self._current = batch
        try:
            self.model(**self._on_device(batch))
        except _Answered:
            return self._outputs[batch]
        raise AssertionError("the forward did not reach the loaded block")

    def recall(self, batch: int) -> None:
        """Prepare `model` so that calling it on this batch returns what the whole model would return."""
        assert self._loaded >= len(self.blocks) - 1, "there are blocks left to run"
        self._loaded, self._current = len(self.blocks), batch

    @torch.no_grad()
    def finish(self, batch: int) -> Any:
        """The model's output for a batch that has run through every block."""
        self.recall(batch)
        return self.model(**self._on_device(batch))

    def _on_device(self, batch: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self._batches[batch].items()}

    def _stand_in(self, index: int) -> Callable[..., Any]:
        """The forward that replaces a block's own."""

        def forward(*arguments: Any, **options: Any) -> Any:
            if index < self._loaded:
                return _each_tensor(self._outputs[self._current], lambda tensor: tensor.to(self.device))
            assert index == self._loaded, "a block ran out of order"
            output = self._forwards[index](*arguments, **options)
            self._outputs[self._current] = _each_tensor(output, spilled)
            raise _Answered

        return forward


def load_outside_blocks(
    model: Any,
    checkpoint: Checkpoint,
    in_blocks: Collection[nn.Parameter],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill an empty model except for its blocks. What transformers would make up is left out.

    Raises ConfigError when a tensor is missing.
    """
    inside = checkpoint.names_in_blocks
    names = [name for name in checkpoint.tensors if name not in inside]
    load_tensors(model, checkpoint, names, device=device, dtype=dtype)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter not in in_blocks:
            if not is_made_up(name, of_base=True):
                raise ConfigError(f"{checkpoint.directory} holds no tensor for {name}")
            model.set_submodule(name.rpartition(".")[0], nn.Identity())


def load_in_blocks(
    checkpoint: Checkpoint,
    class_name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    loaded: Callable[[Any, str], None],
) -> Any:
    """A model that is loaded one block after the other; `loaded` may reduce each before the next is read.

    It is called with the model and the block's path. What lies outside the blocks is loaded last.
    """
    model = empty_model(checkpoint, class_name=class_name, dtype=dtype)
    for path in checkpoint.blocks:
        load_tensors(model, checkpoint, checkpoint.block_tensors(path), device=device, dtype=dtype)
        absent = [
            name for name, each in base_of(model).get_submodule(path).named_parameters() if each.is_meta
        ]
        if absent:
            raise ConfigError(f"{checkpoint.directory} holds no tensor for {path}.{absent[0]}")
        loaded(model, path)
    load_outside_blocks(model, checkpoint, (), device=device, dtype=dtype)
    return model


def unload(module: nn.Module) -> None:
    """Free every tensor of a module that checkpoints store; other buffers stay."""
    for path in module.state_dict():
        *parents, name = path.split(".")
        owner = module.get_submodule(".".join(parents))
        tensor = getattr(owner, name)
        empty = torch.empty_like(tensor, device="meta")
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(empty, requires_grad=False)
        else:
            owner._buffers[name] = empty


def spilled(tensor: Tensor) -> Tensor:
    """The same tensor on the CPU, in an unnamed file whose pages the system writes out when needed."""
    if tensor.numel() == 0:
        return tensor
    with tempfile.TemporaryFile(prefix="ffsplit-") as file:
        size = tensor.numel() * tensor.element_size()
        file.truncate(size)
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, _each_tensor(each, change)) for key, each in value.items())
    if isinstance(value, tuple | list):
        return type(value)(_each_tensor(each, change) for each in value)
    return value
