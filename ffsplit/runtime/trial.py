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
from ffsplit.models.ffns import FFNPlace, join_paths
from ffsplit.models.inputs import media_in_words, part_of, richer_rows
from ffsplit.models.load import check_arguments, load_base_model, load_config
from ffsplit.models.streamed import StreamedModel
from ffsplit.runtime.ffn_tensors import load_ffn
from ffsplit.runtime.modules import SplitExperts, install_split_ffn

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
    check_arguments(checkpoint, inputs)
    rows = media_in_words(checkpoint.reads)
    more = richer_rows(checkpoint.architecture, checkpoint.reads)
    with explained(
        f"{checkpoint.architecture.model_type} cannot be calibrated on {rows}: it is not in the table of "
        "architectures, and a trial of its FFNs on these rows failed",
        kind=UnsupportedModelError,
        advice=more or part_of(load_config(checkpoint.directory)),
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
    differences: list[float] = []
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
        if ffn.block == path and ffn.expert is None and not ffn.paths.can_split:
            watch(ffn)
    try:
        yield differences
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _altered(model: Any, checkpoint: Checkpoint) -> Iterator[None]:
    """The model with the down projection of its first FFN negated: a norm after it would undo a factor."""
    ffn = checkpoint.ffns[0]
    if ffn.expert is None:
        weight = model.get_submodule(join_paths(ffn.block, ffn.paths.down)).weight
    else:
        weight = model.get_submodule(ffn.split_path).down_proj
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
        if ffn.block != path or (ffn.expert is None and not ffn.paths.can_split):
            continue
        activation = activation_named(checkpoint.activation_of(ffn.index))
        halves = _Halves(load_ffn(checkpoint, ffn.index, activation=activation, device=CPU))
        if ffn.expert is None:
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
