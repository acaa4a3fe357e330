"""Checks FFNs that were found by a model's structure: an exact split of them must change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.weights import FFNWeights
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.experts import expert_matrices
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.inputs import media_in_words, part_of, richer_rows
from ffsplit.models.load import check_arguments, load_base_model, load_config
from ffsplit.models.patterns import join_paths
from ffsplit.models.selection import not_run
from ffsplit.models.streamed import StreamedModel
from ffsplit.runtime.ffn_tensors import load_activation, load_ffn
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
    check_arguments(checkpoint, inputs)
    rows = media_in_words(checkpoint.reads)
    more = richer_rows(checkpoint.architecture, checkpoint.reads)
    with explained(
        f"{checkpoint.architecture.model_type} cannot be calibrated on {rows}: it is not in the table of "
        "architectures, and a trial of its FFNs on these rows failed",
        kind=UnsupportedModelError,
        advice=more
        or part_of(load_config(checkpoint.directory))
        or f"it was given {', '.join(inputs)}: FFSplit cannot compress a model that needs other inputs",
    ):
        difference = (_difference_of_blocks if block_by_block else _difference)(checkpoint, inputs)
    if not difference <= TOLERANCE:
        raise _refused(checkpoint, checkpoint.ffns, difference)
    return difference


def _refused(checkpoint: Checkpoint, ffns: Sequence[FFNPlace], difference: float) -> UnsupportedModelError:
    """Why these FFNs are none that FFSplit knows, and how to leave them out if there are others."""
    first, others = ffns[0], len(checkpoint.ffns) - len(ffns)
    names = " ".join(f"--skip '{ffn.name}'" for ffn in ffns)
    return UnsupportedModelError(
        f"{checkpoint.architecture.model_type} is not in the table of architectures; {first.block}: "
        f"{first.paths.up} and {first.paths.down} looked like an FFN, but an exact split changes the model's "
        f"outputs (by {difference:.1e}): its code computes more than a sum over neurons; "
        + (f"leave such FFNs out with {names}" if others else "FFSplit cannot compress it")
    )


@torch.no_grad()
def _difference(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference of any output; one that is only slices of the inputs differs by nothing."""
    model, blocks = load_base_model(checkpoint, device=CPU, dtype=torch.float32), checkpoint.blocks
    with _watched(model, checkpoint) as missed:
        expected = _outputs(model, inputs)

    def depend_on(ffns: Sequence[FFNPlace]) -> bool:
        with _altered(model, ffns):
            found = _outputs(model, inputs)
        return not all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    if missed:
        if depend_on(missed):
            raise UnsupportedModelError(
                f"this {checkpoint.architecture.model_type} computes {missed[0].name} by other code than its "
                "modules', so nothing can observe it: FFSplit cannot compress it"
            )
        raise UnsupportedModelError(not_run(missed))
    if not depend_on(checkpoint.ffns):
        raise UnsupportedModelError(
            f"the outputs of this {checkpoint.architecture.model_type} do not depend on the FFNs that were "
            "found, so nothing could tell a good result from a bad one: FFSplit cannot compress it"
        )
    with ExitStack() as stack:
        found = [
            stack.enter_context(_recomputed(model.get_submodule(each), checkpoint, each)) for each in blocks
        ]
        _outputs(model, inputs)
    own = [pair for each in found for pair in each]
    wrong = {ffn.index: ffn for ffn, difference in own if not difference <= TOLERANCE}
    if wrong:
        raise _refused(checkpoint, list(wrong.values()), _largest([difference for _, difference in own]))
    for block in blocks:
        _split_exactly(model.get_submodule(block), checkpoint, block)
    pairs = zip(_outputs(model, inputs), expected, strict=True)
    return _largest([*(each for _, each in own), *(_relative(*pair) for pair in pairs)])


@contextmanager
def _recomputed(
    block: nn.Module, checkpoint: Checkpoint, path: str
) -> Iterator[list[tuple[FFNPlace, float]]]:
    """Collects how far the output of each FFN of a block is from that of its weights, for what it reads.

    It tells which FFN is wrong, and tries those in which no split can be installed.
    """
    differences = [
        (ffn, _difference_of_stack(block, checkpoint, ffn))
        for ffn in checkpoint.ffns
        if ffn.block == path and ffn.is_stacked and ffn.paths.narrow_only
    ]
    handles = []

    def watch(ffn: FFNPlace) -> None:
        seen: list[Tensor] = []
        activation = load_activation(checkpoint, ffn.index, device=CPU)
        weights = load_ffn(checkpoint, ffn.index, activation=activation, device=CPU)

        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].flatten(0, -2))

        def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            differences.append((ffn, _relative(weights(seen.pop()), output.flatten(0, -2))))

        handles.append(block.get_submodule(ffn.paths.up).register_forward_pre_hook(before))
        handles.append(block.get_submodule(ffn.paths.down).register_forward_hook(after))

    for ffn in checkpoint.ffns:
        if ffn.block == path and not ffn.is_stacked and not ffn.paths.per_neuron:
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
def _watched(model: Any, checkpoint: Checkpoint) -> Iterator[list[FFNPlace]]:
    """Fills a list, as the model runs, with the FFNs and the blocks' experts whose modules get no input."""
    missed = {ffn.index: ffn for ffn in checkpoint.ffns if ffn.index == ffn.unit}
    found: list[FFNPlace] = []

    def watch(ffn: FFNPlace) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
            values = (*arguments, *options.values())
            if any(isinstance(each, Tensor) and each.numel() for each in values):
                missed.pop(ffn.index, None)

        first = join_paths(ffn.block, ffn.paths.up) if ffn.expert is None else ffn.runner
        return model.get_submodule(first).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(ffn) for ffn in list(missed.values())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found += missed.values()


@contextmanager
def _altered(model: Any, ffns: Sequence[FFNPlace]) -> Iterator[None]:
    """The model with these FFNs' down projections negated: a norm after one would undo a factor."""
    weights = [_down_weight(model, ffn) for ffn in ffns if ffn.index == ffn.unit or not ffn.is_stacked]
    for weight in weights:
        weight.neg_()
    try:
        yield
    finally:
        for weight in weights:
            weight.neg_()


def _down_weight(model: Any, ffn: FFNPlace) -> Tensor:
    """The down projection of an FFN, or of all experts that are stacked with it."""
    if not ffn.is_stacked:
        weight: Tensor = model.get_submodule(join_paths(ffn.block, ffn.paths.down)).weight
        return weight
    assert ffn.paths.stack is not None
    stacked: Tensor = model.get_submodule(ffn.split_path).get_parameter(ffn.paths.stack.down)
    return stacked


def _outputs(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The floats that a model returns, in order: states, embeddings, logits, maps of features."""
    torch.manual_seed(0)
    return list(_floats(model(**inputs)))


def _floats(value: Any) -> Iterator[Tensor]:
    """The float tensors in an output; its mappings and sequences may be nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(each)


def _difference_of_blocks(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference after any block. The same rows go through the dense and the split blocks."""
    model = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
    model.start([inputs, inputs])
    differences = []
    for index, path in enumerate(model.block_paths):
        with model.block(index) as block:
            with _recomputed(block, checkpoint, path) as own:
                expected = _states(model.advance(0))
            differences += [difference for _, difference in own]
            _split_exactly(block, checkpoint, path)
            differences.append(_relative(_states(model.advance(1)), expected))
    return _largest(differences)


def _split_exactly(block: nn.Module, checkpoint: Checkpoint, path: str) -> None:
    """Replace every FFN of a block by its two halves, or exchange its neurons where it cannot be split."""
    experts: dict[int, SplitExperts] = {}
    for ffn in checkpoint.ffns:
        if ffn.block == path and ffn.paths.per_neuron:
            _reverse_neurons(block, ffn)
        if ffn.block != path or ffn.paths.narrow_only or (not ffn.is_stacked and not ffn.paths.can_split):
            continue
        activation = load_activation(checkpoint, ffn.index, device=CPU)
        halves = _Halves(load_ffn(checkpoint, ffn.index, activation=activation, device=CPU))
        if not ffn.is_stacked:
            install_split_ffn(block, ffn.paths, halves)
            continue
        if ffn.index == ffn.unit:
            experts[ffn.unit] = SplitExperts(guard=None)
            install_split_ffn(block, ffn.paths, experts[ffn.unit])
        experts[ffn.unit].append(halves)


def _reverse_neurons(block: nn.Module, ffn: FFNPlace) -> None:
    """Put an FFN's neurons in reverse order: no output changes if each is treated by itself."""
    for path in (ffn.paths.up, *ffn.paths.per_neuron):
        module = block.get_submodule(path)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dim():
                tensor.copy_(tensor.flip(0))
    down: Any = block.get_submodule(ffn.paths.down)
    down.weight.copy_(down.weight.flip(1))


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
