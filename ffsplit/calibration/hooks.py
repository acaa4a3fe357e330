"""Hooks that watch every FFN of a model while it reads calibration text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ffsplit.calibration.model_inputs import Batch, on_device
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.sums import NeuronSums
from ffsplit.errors import CalibrationError
from ffsplit.models.experts import (
    as_pairs,
    by_position,
    called_module,
    expert_activations,
    expert_matrices,
    expert_outputs,
    own_activations,
    sent_to_modules,
)
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.selection import not_run
from ffsplit.models.streamed import StreamedModel


@dataclass(frozen=True)
class Sampling:
    """The tokens whose FFN inputs are kept: `choose(n)` returns ascending positions below n.

    `num_tokens` is the number of tokens, by the name of the mask that separates them from padding, where it
    is known.
    """

    choose: Callable[[int], Tensor]
    num_tokens: Mapping[str, int] = field(default_factory=dict)
    num_rows: int = 1


NOTHING = Sampling(lambda _: torch.empty(0, dtype=torch.long))


class _Stream:
    """The tokens that FFNs see, numbered over all batches, and which of them are sampled.

    A tower whose batches have no mask sees every position. Where the number of tokens is not known, it is
    learned from the first batch: all rows are taken to have as many as that batch's.
    """

    def __init__(self, mask: str | None, sampling: Sampling) -> None:
        self._mask, self._sampling = mask, sampling
        self._num_rows = self._num_positions = 0
        self._is_known = False
        self._sampled = torch.empty(0, dtype=torch.long)
        self._sampled_here: Tensor | None = None
        self.start = self.stop = 0
        self.rows: Tensor | None = None
        if mask is not None and mask in sampling.num_tokens:
            self._sampled = sampling.choose(sampling.num_tokens[mask])

    def next_batch(self, arguments: Mapping[str, Tensor]) -> None:
        self.start, self.rows, self._sampled_here = self.stop, None, None
        self._num_rows = len(next(iter(arguments.values())))
        mask = None if self._mask is None else arguments.get(self._mask)
        self._is_known = mask is not None
        if mask is not None:
            rows = mask.flatten().nonzero().flatten()
            self.rows = None if len(rows) == mask.numel() else rows
            if self.start == 0 and self._mask not in self._sampling.num_tokens:
                self._sampled = self._chosen_of(len(rows))
            self.stop += len(rows)
            self._num_positions = mask.numel()

    def _chosen_of(self, in_first_batch: int) -> Tensor:
        """The sampled positions, if all rows have as many tokens as those of the first batch."""
        return self._sampling.choose(-(-in_first_batch * self._sampling.num_rows // self._num_rows))

    def without_mask(self) -> _Stream:
        """A stream of all positions, from the announced batch on."""
        stream = _Stream(None, self._sampling)
        stream.stop, stream._sampled = self.start, self._sampled
        return stream

    def covers(self, values: Tensor) -> bool:
        """Whether [..., n] has a row for each position of the announced batch, as far as these are known."""
        return not self._is_known or values.shape[:-1].numel() == self._num_positions

    def positions(self, values: Tensor) -> Tensor:
        """All rows of [..., n]. `self.rows` are the indices of those that belong to tokens; None: all."""
        flat = values.detach().flatten(0, -2)
        if not self._is_known:
            if self.start == 0:
                self._sampled = self._chosen_of(len(flat))
            self.stop, self._is_known, self._num_positions = self.start + len(flat), True, len(flat)
        self.rows = None if self.rows is None else on_device(self.rows, flat.device)
        return flat

    def tokens(self, values: Tensor) -> Tensor:
        """The rows of [..., n] that belong to tokens."""
        flat = self.positions(values)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def sampled_rows(self, device: torch.device) -> Tensor:
        """Which of this batch's tokens are sampled. Found and moved once per batch, not once per FFN."""
        if self._sampled_here is None:
            bounds = torch.tensor([self.start, self.stop])
            first, last = torch.searchsorted(self._sampled, bounds).tolist()
            self._sampled_here = self._sampled[first:last] - self.start
        self._sampled_here = on_device(self._sampled_here, device)
        return self._sampled_here

    @property
    def may_be_sampled(self) -> bool:
        return not self._is_known or len(self.sampled_rows(torch.device("cpu"))) > 0


class FFNObserver:
    """Collects statistics of the neurons, and a sample of the inputs, of FFNs of a base model.

    Use as a context manager around the forward passes, and call `next_batch` before each. Positions
    are counted over the non-padding tokens of all batches, in order. `inputs_only` collects no
    statistics. Experts are observed at the input of the module that runs them all, and recomputed for the
    tokens that the router sends them, because modules run experts in different ways.
    """

    def __init__(
        self,
        base_model: nn.Module,
        ffns: Sequence[FFNPlace],
        *,
        sampling: Sampling = NOTHING,
        inputs_only: bool = False,
    ) -> None:
        self._handles: list[Any] = []
        self._base, self._ffns, self._inputs_only = base_model, ffns, inputs_only
        towers = dict.fromkeys(ffn.tower for ffn in ffns)
        self._sampling = sampling
        self._streams = {tower.name: _Stream(tower.mask, sampling) for tower in towers}
        self._own_streams: dict[int, _Stream] = {}
        self._arguments: Mapping[str, Tensor] = {}
        self._num_batches = 0
        self._num_calls: Counter[str] = Counter()
        self._num_inputs: Counter[int] = Counter()
        self._sums = {ffn.index: NeuronSums(_down_weight(base_model, ffn), ffn.expert) for ffn in ffns}
        self._inputs: dict[int, list[dict[str, Tensor]]] = {}

    def __enter__(self) -> FFNObserver:
        for path in dict.fromkeys(path for ffn in self._ffns for path in (ffn.block, *ffn.twins)):
            self._watch(self._base.get_submodule(path), self._count_hook(path))
        for ffn in self._ffns:
            for path in (ffn.block, *ffn.twins):
                block = self._base.get_submodule(path)
                if ffn.expert is None:
                    self._watch(block.get_submodule(ffn.paths.up), self._input_hook(ffn))
                    if not self._inputs_only:
                        self._watch(block.get_submodule(ffn.paths.down), self._activation_hook(ffn))
                elif ffn.index == ffn.unit:
                    self._watch_experts(block, ffn)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(hook))

    def next_batch(self, arguments: Mapping[str, Tensor]) -> None:
        """Announce the arguments of the next forward pass, including masks [rows, length]."""
        self._arguments = arguments
        self._num_batches += 1
        for stream in (*self._streams.values(), *self._own_streams.values()):
            stream.next_batch(arguments)

    def _stream(self, ffn: FFNPlace, values: Tensor) -> _Stream:
        """The stream of what an FFN sees: its tower's, or its own where it sees other positions.

        Some models merge, pool or pad positions between their blocks, or sort them by expert.
        """
        stream = self._own_streams.get(ffn.unit, self._streams[ffn.tower.name])
        is_sorted = ffn.paths.stack is not None and ffn.paths.stack.call == "grouped"
        if not stream.covers(values) or (is_sorted and ffn.unit not in self._own_streams):
            stream = self._own_streams[ffn.unit] = stream.without_mask()
            stream.next_batch(self._arguments)
        return stream

    @property
    def batch_is_sampled(self) -> bool:
        """Whether any input of the announced batch is to be kept."""
        streams = (*self._streams.values(), *self._own_streams.values())
        return any(stream.may_be_sampled for stream in streams)

    def _count_hook(self, block: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._num_calls[block] += 1

        return hook

    def _activation_hook(self, ffn: FFNPlace) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            stream = self._stream(ffn, arguments[0])
            self._sums[ffn.index].add(stream.positions(arguments[0]), rows=stream.rows)

        return hook

    def _input_hook(self, ffn: FFNPlace) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            stream = self._stream(ffn, arguments[0])
            flat_TD = stream.positions(arguments[0])
            self._num_inputs[ffn.index] += len(flat_TD if stream.rows is None else stream.rows)
            rows = stream.sampled_rows(flat_TD.device)
            if len(rows):
                rows = rows if stream.rows is None else stream.rows[rows]
                self._keep(ffn, {"input": flat_TD[rows]})

        return hook

    def _watch_experts(self, block: nn.Module, first: FFNPlace) -> None:
        mine = [ffn for ffn in self._ffns if ffn.unit == first.unit]
        runner = block.get_submodule(first.runner.removeprefix(f"{first.block}."))
        stack = first.paths.stack
        modules = [] if stack else [block.get_submodule(ffn.paths.split_path) for ffn in mine]

        def activations(ffn: FFNPlace, x_TD: Tensor) -> Tensor:
            default = ffn.tower.default_activation
            if stack is None:
                return own_activations(block, ffn.paths, x_TD, default=default)
            return expert_activations(runner, ffn.paths, ffn.expert or 0, x_TD, default=default)

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if stack is None:
                called = sent_to_modules(runner, modules, arguments)
            else:
                called = by_position(stack, len(mine), arguments)
            stream = self._stream(first, called.states)
            tokens = called.mapped(stream.tokens)
            rows = stream.sampled_rows(called.states.device)
            if len(rows):
                kept = as_pairs(stack, tokens.mapped(lambda each: each[rows]), len(mine))
                self._keep(first, {"input": kept.states, "experts": kept.experts})
            if self._inputs_only:
                return
            pairs = as_pairs(stack, tokens, len(mine))
            for ffn in mine:
                is_chosen_TK = pairs.experts.eq(ffn.expert or 0)
                rows = is_chosen_TK.any(1)
                activation_TN, sums = activations(ffn, pairs.states[rows]), self._sums[ffn.index]
                sums.add(activation_TN)
                if pairs.weights is not None:
                    output_TD = expert_outputs(runner, ffn.paths, ffn.expert or 0, activation_TN)
                    sums.add_outputs(output_TD, (pairs.weights * is_chosen_TK)[rows].sum(1))

        self._watch(runner if stack is None else called_module(runner, stack), hook)

    def _keep(self, ffn: FFNPlace, tensors: dict[str, Tensor]) -> None:
        self._inputs.setdefault(ffn.unit, []).append(tensors)

    def statistics(self) -> tuple[NeuronStats, ...]:
        """The statistics of the observed FFNs.

        Raises CalibrationError when one missed a token or is not finite.
        """
        for unit in dict.fromkeys(ffn.unit for ffn in self._ffns):
            self._check_counts([ffn for ffn in self._ffns if ffn.unit == unit])
        statistics = NeuronSums.results([self._sums[ffn.index] for ffn in self._ffns])
        for ffn, stats in zip(self._ffns, statistics, strict=True):
            if not np.isfinite(stats.sum_squares).all():
                raise CalibrationError(
                    f"{ffn.name} has activations that are not finite: look for NaN or infinite weights, "
                    "or compute in a wider --dtype"
                )
        return tuple(statistics)

    def _check_counts(self, ffns: Sequence[FFNPlace]) -> None:
        """An FFN must see every token once each time that the model runs its block, most do once.

        A block's experts together must see all tokens equally often. Those that are modules of their own may
        see fewer: a router with a capacity drops tokens. An FFN that sees other positions than those of
        tokens, perhaps in several calls, must see at its end what it saw at its start.
        """
        first = ffns[0]
        total = self._own_streams.get(first.unit, self._streams[first.tower.name]).stop
        seen = sum(self._sums[ffn.index].num_tokens for ffn in ffns)
        num_calls = sum(self._num_calls[block] for block in (first.block, *first.twins))
        num_runs = num_calls / max(1, self._num_batches)
        if first.expert is not None:
            expected = not first.is_stacked or (total > 0 and seen % total == 0)
        elif first.unit in self._own_streams:
            total = self._num_inputs[first.index]
            expected = seen == total
        else:
            expected = seen == total * num_runs
        what = first.name if first.expert is None else first.name.replace("expert 0", "experts")
        if not num_calls:
            raise CalibrationError(not_run([first]))
        if not total or not seen or not expected:
            raise CalibrationError(
                f"{what} saw {seen} of {total} tokens: the model bypasses the hooks on its FFN"
            )

    def inputs(self) -> dict[int, dict[str, Tensor]]:
        """The sampled inputs [T, D], in the model's dtype, by the index of the FFN. A block's experts share
        one entry, at the index of the first, with the experts [T, K] that each token was sent to.

        They were gathered on the model's device, and are moved off it here, all at once.
        """
        return to_cpu(
            {
                index: {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                for index, parts in sorted(self._inputs.items())
            }
        )


def to_cpu(tensors: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The same on the CPU. From a GPU all are copied to pinned memory, and the GPU is waited for once."""
    moved = {
        index: {name: _begin_copy(tensor) for name, tensor in each.items()} for index, each in tensors.items()
    }
    if any(tensor.is_cuda for each in tensors.values() for tensor in each.values()):
        torch.cuda.current_stream().synchronize()
    return moved


def _begin_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _down_weight(base_model: nn.Module, ffn: FFNPlace) -> Tensor:
    """The down projection as [D, N], however the module stores it."""
    if ffn.is_stacked:
        return expert_matrices(base_model.get_submodule(ffn.runner), ffn.paths, ffn.expert or 0).down.detach()
    weight = base_model.get_submodule(f"{ffn.block}.{ffn.paths.down}").weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if ffn.down.transposed else weight.detach()


# Run a shard's batches through a model and observe it: the whole model at once, or one block at a time.


class Observed(NamedTuple):
    """What was observed of one FFN; either field is None if it was not requested or not sampled.

    `inputs` are those of `FFNObserver.inputs`: a block's experts share the entry of the first.
    """

    statistics: NeuronStats | None
    inputs: Mapping[str, Tensor] | None


@torch.no_grad()
def observe(
    model: Any,
    ffns: Sequence[FFNPlace],
    batches: Sequence[Batch],
    *,
    sampling: Sampling,
    inputs_only: bool = False,
) -> Iterator[Observed]:
    """Observe every FFN, in order. `sampling` and `inputs_only` are FFNObserver's.

    A streamed model loads its blocks as the FFNs are requested; the bytes are the same.
    """
    if isinstance(model, StreamedModel):
        yield from _block_by_block(model, ffns, batches, sampling=sampling, inputs_only=inputs_only)
        return
    with FFNObserver(model, ffns, sampling=sampling, inputs_only=inputs_only) as observer:
        for batch in batches:
            observer.next_batch(batch.arguments)
            if not inputs_only or observer.batch_is_sampled:
                model(**batch.to(model.device, dtype=model.dtype).arguments)
    yield from _observed(observer, ffns, inputs_only=inputs_only)


def _block_by_block(
    model: StreamedModel,
    ffns: Sequence[FFNPlace],
    batches: Sequence[Batch],
    *,
    sampling: Sampling,
    inputs_only: bool,
) -> Iterator[Observed]:
    model.start([batch.arguments for batch in batches])
    for index, path in enumerate(model.block_paths):
        inside = [ffn for ffn in ffns if ffn.block == path]
        with model.block(index):
            observer = FFNObserver(model.base_model, inside, sampling=sampling, inputs_only=inputs_only)
            with observer:
                for number, batch in enumerate(batches):
                    observer.next_batch(batch.arguments)
                    if not inputs_only or observer.batch_is_sampled:
                        model.advance(number)
        yield from _observed(observer, inside, inputs_only=inputs_only)


def _observed(observer: FFNObserver, ffns: Sequence[FFNPlace], *, inputs_only: bool) -> Iterator[Observed]:
    statistics, inputs = None if inputs_only else observer.statistics(), observer.inputs()
    for position, ffn in enumerate(ffns):
        yield Observed(statistics[position] if statistics else None, inputs.get(ffn.index))
