"""A model of which one block at a time is in memory.

The model's own forward runs once for every block and batch. Blocks before the loaded one answer with
the output that is stored for the batch, and the forward is left as soon as the loaded block has
answered. So whatever a family does around its blocks (masks, positions, what it hands from block to
block) is done by its own code, and the bytes are those of the whole model.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import empty_model, is_made_up, load_tensors

Inputs = Mapping[str, Tensor]


class _Answered(Exception):
    """The loaded block has answered: the rest of the forward has nothing to run on."""


class StreamedModel:
    """Everything but the blocks of a checkpoint's model, and its blocks one at a time.

    `start` takes the batches, as arguments of a forward. Each block is then loaded in turn, in order,
    and each batch is brought through it. After the last block, `finish` gives the model's own output
    for a batch, or `recall` has it wait for the same call from elsewhere. Block outputs wait in files
    without a name, which go with the process; only the pages in use are in memory. Raises ConfigError
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
        self.base_model = getattr(self.model, self.model.base_model_prefix, self.model)
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
        inside = self._checkpoint.names_in_blocks
        self._load([name for name in self._checkpoint.tensors if name not in inside])
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and parameter not in in_blocks:
                if not is_made_up(name, of_base=True):
                    raise ConfigError(f"{self._checkpoint.directory} holds no tensor for {name}")
                self.model.set_submodule(name.rpartition(".")[0], nn.Identity())

    def _load(self, names: Sequence[str]) -> None:
        load_tensors(self.model, self._checkpoint, names, device=self.device, dtype=self._dtype)

    def start(self, batches: Sequence[Inputs]) -> None:
        """Take the batches that are brought through the blocks from now on."""
        self._batches = list(batches)
        self._outputs = [None] * len(self._batches)
        self._loaded = -1

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Load a block for as long as every batch needs to be brought through it."""
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
        """Bring a batch through the loaded block, and give its output."""
        self._current = batch
        try:
            self.model(**self._on_device(batch))
        except _Answered:
            return self._outputs[batch]
        raise AssertionError("the forward did not come to the loaded block")

    def recall(self, batch: int) -> None:
        """From now on `model` itself, called on this batch, gives what it would give if it were whole."""
        assert self._loaded >= len(self.blocks) - 1, "there are blocks left to run"
        self._loaded, self._current = len(self.blocks), batch

    @torch.no_grad()
    def finish(self, batch: int) -> Any:
        """What the model gives for a batch that has been through every block."""
        self.recall(batch)
        return self.model(**self._on_device(batch))

    def _on_device(self, batch: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self._batches[batch].items()}

    def _stand_in(self, index: int) -> Callable[..., Any]:
        """What a block's forward is replaced by."""

        def forward(*arguments: Any, **options: Any) -> Any:
            if index < self._loaded:
                return _each_tensor(self._outputs[self._current], lambda tensor: tensor.to(self.device))
            assert index == self._loaded, "a block ran out of order"
            output = self._forwards[index](*arguments, **options)
            self._outputs[self._current] = _each_tensor(output, spilled)
            raise _Answered

        return forward


def unload(module: nn.Module) -> None:
    """Let go of every tensor that a checkpoint gives a module; buffers that it does not give stay."""
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
    """The same tensor on the CPU, in a file without a name, whose pages the system writes out at need."""
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
