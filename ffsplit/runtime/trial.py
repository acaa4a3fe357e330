"""Checks FFNs that were found by a model's structure: an exact split of them must change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.weights import FFNWeights
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.experts import expert_matrices
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.load import load_base_model
from ffsplit.models.patterns import join_paths
from ffsplit.models.streamed import StreamedModel
from ffsplit.runtime.ffn_tensors import load_ffn
from ffsplit.runtime.modules import SplitExperts, install_split_ffn, matching

TOLERANCE = 1e-4
"""Largest difference of an output, as a fraction of the largest output."""
CPU = torch.device("cpu")


class _Halves(nn.Module):
    """An FFN as the sum of two halves of its neurons."""

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        self._split = weights.split(torch.arange(0, len(weights.parts[0].neurons), 2))

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self._split(x.reshape(-1, x.shape[-1]))
        return flat.reshape(x.shape)


def check_by_trial(checkpoint: Checkpoint, inputs: Mapping[str, Tensor], *, block_by_block: bool) -> float:
    """Split every FFN exactly and run the model on a batch of its rows, whole or block by block.

    Returns the largest difference of its outputs, or a block's, from the dense ones, as a fraction of the
    largest output. Raises UnsupportedModelError if that is not next to nothing: what was found by structure
    are not its FFNs.
    """
    with explained(
        f"{checkpoint.architecture.model_type} is not in the table of architectures, and a trial of the FFNs "
        "found by its structure failed",
        kind=UnsupportedModelError,
    ):
        difference = (_difference_of_blocks if block_by_block else _difference)(checkpoint, inputs)
    if not difference <= TOLERANCE:
        first = checkpoint.ffns[0]
        raise UnsupportedModelError(
            f"{checkpoint.architecture.model_type} is not in the table of architectures; {first.block}: "
            f"{first.paths.up} and {first.paths.down} looked like its FFNs, but an exact split of them "
            f"changes the model's outputs (by {difference:.1e})"
        )
    return difference


@torch.no_grad()
def _difference(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference of any output; one that is only slices of the inputs differs by nothing."""
    model, blocks = load_base_model(checkpoint, device=CPU, dtype=torch.float32), checkpoint.blocks
    expected = _outputs(model, inputs)
    with _altered(model, checkpoint):
        if all(torch.equal(*pair) for pair in zip(_outputs(model, inputs), expected, strict=True)):
            raise UnsupportedModelError("its outputs do not depend on the FFNs that were found")
    with ExitStack() as stack:
        own = [
            stack.enter_context(_recomputed(model.get_submodule(each), checkpoint, each)) for each in blocks
        ]
        _outputs(model, inputs)
    for block in blocks:
        _split_exactly(model.get_submodule(block), checkpoint, block)
    pairs = zip(_outputs(model, inputs), expected, strict=True)
    return _largest([*chain.from_iterable(own), *(_relative(found, wanted) for found, wanted in pairs)])


@contextmanager
def _recomputed(block: nn.Module, checkpoint: Checkpoint, path: str) -> Iterator[list[float]]:
    """Collects how far the output of each FFN of a block is from that of its weights, for what it reads.

    For FFNs that the model computes by functions between its modules, so that no split can be installed.
    """
    differences = [
        _difference_of_stack(block, checkpoint, ffn)
        for ffn in checkpoint.ffns
        if ffn.block == path and ffn.is_stacked and ffn.paths.narrow_only
    ]
    handles = []

    def watch(ffn: FFNPlace) -> None:
        seen: list[Tensor] = []
        activation = activation_named(checkpoint.activation_of(ffn.index))
        weights = load_ffn(checkpoint, ffn.index, activation=activation, device=CPU)

        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].flatten(0, -2))

        def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            differences.append(_relative(weights(seen.pop()), output.flatten(0, -2)))

        handles.append(block.get_submodule(ffn.paths.up).register_forward_pre_hook(before))
        handles.append(block.get_submodule(ffn.paths.down).register_forward_hook(after))

    for ffn in checkpoint.ffns:
        if ffn.block == path and not ffn.is_stacked and not ffn.paths.can_split:
            watch(ffn)
    patterns = {ffn.paths.adapters for ffn in checkpoint.ffns if ffn.block == path}
    paths = [found for pattern in patterns for found in matching(block, pattern)]
    adapters = [block.get_parameter(f"{found}.weight") for found in paths]
    values = [each.clone() for each in adapters]
    try:
        for each in adapters:
            each.zero_()  # what they add is no part of the FFN's own function
        yield differences
    finally:
        for each, value in zip(adapters, values, strict=True):
            each.copy_(value)
        for handle in handles:
            handle.remove()


def _difference_of_stack(block: nn.Module, checkpoint: Checkpoint, ffn: FFNPlace) -> float:
    """How far an expert's matrices are from those of its module, whose code was tried as it was found."""
    stack, paths = ffn.paths.stack, ffn.paths
    assert stack is not None and paths.module is not None and ffn.expert is not None
    module = block.get_submodule(paths.module)
    weights = load_ffn(checkpoint, ffn.index, activation=activation_named("relu"), device=CPU)
    (part,) = weights.parts
    own = expert_matrices(module, paths, ffn.expert)
    loaded = (part.up, part.gate, part.down)
    return max(
        _relative(found.weight, wanted)
        for found, wanted in zip(loaded, own, strict=True)
        if found is not None and wanted is not None
    )


@contextmanager
def _altered(model: Any, checkpoint: Checkpoint) -> Iterator[None]:
    """The model with the down projection of its first FFN negated: a norm after it would undo a factor."""
    ffn = checkpoint.ffns[0]
    if not ffn.is_stacked:
        weight = model.get_submodule(join_paths(ffn.block, ffn.paths.down)).weight
    else:
        assert ffn.paths.stack is not None
        weight = model.get_submodule(ffn.split_path).get_parameter(ffn.paths.stack.down)
    weight.neg_()
    try:
        yield
    finally:
        weight.neg_()


def _outputs(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The floats that a model returns, in order: states, embeddings, logits."""
    torch.manual_seed(0)
    found = model(**inputs)
    values = found.values() if isinstance(found, Mapping) else found
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]


def _difference_of_blocks(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference after any block. The same rows go through the dense and the split blocks."""
    model = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
    model.start([inputs, inputs])
    differences = []
    for index, path in enumerate(model.block_paths):
        with model.block(index) as block:
            with _recomputed(block, checkpoint, path) as own:
                expected = _states(model.advance(0))
            differences += own
            _split_exactly(block, checkpoint, path)
            differences.append(_relative(_states(model.advance(1)), expected))
    return _largest(differences)


def _split_exactly(block: nn.Module, checkpoint: Checkpoint, path: str) -> None:
    """Replace every FFN of a block by its two halves."""
    experts: dict[int, SplitExperts] = {}
    for ffn in checkpoint.ffns:
        if ffn.block != path or ffn.paths.narrow_only or (not ffn.is_stacked and not ffn.paths.can_split):
            continue
        activation = activation_named(checkpoint.activation_of(ffn.index))
        halves = _Halves(load_ffn(checkpoint, ffn.index, activation=activation, device=CPU))
        if not ffn.is_stacked:
            install_split_ffn(block, ffn.paths, halves)
            continue
        if ffn.index == ffn.unit:
            experts[ffn.unit] = SplitExperts(guard=None)
            install_split_ffn(block, ffn.paths, experts[ffn.unit])
        experts[ffn.unit].append(halves)


def _states(output: Any) -> Tensor:
    """A block's hidden states: its output, or the first item of it."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a fraction of the largest finite value; equal infinities do not differ."""
    scale = torch.where(expected.isfinite(), expected, 0).abs().amax() if expected.numel() else 0
    differing = found != expected
    return float((found - expected)[differing].abs().amax() / scale) if differing.any() else 0.0


def _largest(differences: Sequence[float]) -> float:
    """NaN if any is NaN, which `max` may skip."""
    return float(torch.tensor(differences).amax())
