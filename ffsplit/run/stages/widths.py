"""Tables of widths: what the whole model loses where one FFN alone is narrower, at some widths of each.

Every FFN is fitted at each width by the closed form that the recipe begins with. Then workers that hold the
original exchange one FFN at a time. Later fits move all errors down together, so they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ffsplit.calibration.model_inputs import Batch
from ffsplit.calibration.readers import make_reader
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compressors import PruneCompressor
from ffsplit.compressors.base import LayerContext
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.directories import temporary_folder
from ffsplit.errors import BudgetError, FFSplitError
from ffsplit.ffn.shapes import LayerLayout, ModelShape
from ffsplit.keys import stage_key
from ffsplit.measurement.fidelity import predicted_logits
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.family import FFNPaths
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_whole_model
from ffsplit.models.names import base_of
from ffsplit.run.checks import closed_form
from ffsplit.run.stages.calibrate import input_files
from ffsplit.runtime.ffn_tensors import load_activation, load_ffn
from ffsplit.splitting.knapsack import (
    KL_ROWS,
    Curve,
    WidthTable,
    best_layouts,
    curve_of,
    measured_widths,
    nearest_measured,
    width_step,
)
from ffsplit.splitting.scores import plan_split
from ffsplit.splitting.solver import Layouts, Solver
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution


class WidthsJob(Record):
    """One FFN: for each width, which neurons are kept; and where its sampled inputs are."""

    model: ModelSource
    layer: int
    neurons: tuple[tuple[int, ...], ...]
    step: PruneCompressor
    inputs: tuple[FileEntry, ...]
    scratch: Scratch
    profile: ComputeProfile

    @property
    def name(self) -> str:
        return f"layer-{self.layer:03d}"


def fit_widths_job(job: WidthsJob) -> Result:
    """Fit one FFN at every width, into one file of down projections in the scratch."""
    with job.profile.applied():
        return job.scratch.load_or_compute(job.name, lambda: _fit(job))


@torch.no_grad()
def _fit(job: WidthsJob) -> Result:
    device = torch.device(job.profile.device)
    checkpoint = job.model.checkpoint(uneven=True)
    activation = load_activation(checkpoint, job.layer, device=device)
    original = load_ffn(checkpoint, job.layer, activation=activation, device=device)
    context = LayerContext(original, [_inputs(job, entry) for entry in job.inputs])
    dtype = getattr(torch, job.profile.dtype)
    tensors: dict[str, Tensor] = {}
    for kept in job.neurons:
        layout = LayerLayout.dense(checkpoint.shapes[job.layer], len(kept))
        split = original.split(torch.tensor(kept, dtype=torch.long))
        fitted = job.step.compress(split, layout=layout, context=context)
        assert fitted.heavy is not None
        found = {"neurons": fitted.heavy.neurons, "down": fitted.heavy.down.weight.to(dtype)}
        if fitted.down_bias is not None:
            found["bias"] = fitted.down_bias.to(dtype, copy=True)
        tensors |= {f"{len(kept)}.{name}": each.cpu().contiguous() for name, each in found.items()}
    with temporary_folder() as folder:
        path = folder / f"{job.name}.safetensors"
        save_file(tensors, path, {"format": "pt"})
        return job.scratch.save(job.name, {path.name: path}, facts={"layer": job.layer})


def _inputs(job: WidthsJob, entry: FileEntry) -> Tensor:
    with job.scratch.reading(entry) as path:
        tensors: dict[str, Tensor] = load_file(path, device=job.profile.device)
    return tensors["input"].float()


class TableJob(Record):
    """What a worker needs to measure tables: the original, the fitted FFNs, and the rows.

    `around` are the widths that the other FFNs have; None: they are whole.
    """

    original: ModelSource
    fitted: tuple[FileEntry, ...]
    widths: tuple[tuple[int, ...], ...]
    around: tuple[int, ...] | None
    rows: tuple[str, ...]
    max_length: int
    batch_tokens: int
    scratch: Scratch
    profile: ComputeProfile


class TableItem(Record):
    """The FFN to measure."""

    layer: int

    @property
    def name(self) -> str:
        return f"layer-{self.layer:03d}"


class TableWorker:
    """Holds the model, which is loaded for the first FFN that is not measured yet."""

    def __init__(self, job: TableJob) -> None:
        self._job = job

    def __call__(self, item: TableItem) -> Result:
        """The KL divergence from the original at each width of one FFN, in the scratch."""
        job = self._job
        with job.profile.applied():
            return job.scratch.load_or_compute(item.name, lambda: self._measure(item))

    @cached_property
    def _bench(self) -> _Bench:
        return _Bench(self._job)

    @torch.no_grad()
    def _measure(self, item: TableItem) -> Result:
        job = self._job
        errors = self._bench.errors(item.layer, job.widths[item.layer])
        return job.scratch.save(item.name, {}, facts={"layer": item.layer, "errors": list(errors)})


class _Bench:
    """The model with the widths around, and the logits of the original."""

    @torch.no_grad()
    def __init__(self, job: TableJob) -> None:
        self._job = job
        self._checkpoint = checkpoint = job.original.checkpoint()
        device, dtype = torch.device(job.profile.device), getattr(torch, job.profile.dtype)
        reader = make_reader(checkpoint, max_length=job.max_length, batch_tokens=job.batch_tokens)
        self._batches = [batch.to(device) for batch in reader.batches(reader.encode(job.rows))]
        self._model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=dtype).to(device)
        base = base_of(self._model)
        self._downs = [_Down(base.get_submodule(ffn.block), ffn.paths) for ffn in checkpoint.ffns]
        self._logits = [predicted_logits(self._model, batch) for batch in self._batches]
        for layer, width in enumerate(job.around or ()):
            self._downs[layer].put(self._variant(self._fitted(layer), layer, width))
        self._prefix = _Prefix(self._model, checkpoint, self._batches)

    def errors(self, layer: int, widths: Sequence[int]) -> Iterator[float]:
        """The KL divergence at each width of one FFN, which then has its own width again."""
        ffn, fitted = self._checkpoint.ffns[layer], self._fitted(layer)
        own = self._job.around[layer] if self._job.around else ffn.shape.num_neurons
        for width in widths:
            self._downs[layer].put(self._variant(fitted, layer, width))
            yield self._divergence(ffn.block)
        self._downs[layer].put(self._variant(fitted, layer, own))

    def _fitted(self, layer: int) -> dict[str, Tensor]:
        """One FFN at all widths, on the CPU."""
        with self._job.scratch.reading(self._job.fitted[layer]) as path:
            tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def _variant(self, fitted: Mapping[str, Tensor], layer: int, width: int) -> dict[str, Tensor] | None:
        """One FFN at one width, as its down projection; None if it is whole."""
        if width == self._checkpoint.shapes[layer].num_neurons:
            return None
        start, device = f"{width}.", self._job.profile.device
        found = (name for name in fitted if name.startswith(start))
        return {name.removeprefix(start): fitted[name].to(device) for name in found}

    def _divergence(self, block: str) -> float:
        total, num_tokens = 0.0, 0
        for index, (batch, original_TV) in enumerate(zip(self._batches, self._logits, strict=True)):
            with self._prefix.before(block, index):
                logits_TV = predicted_logits(self._model, batch)
            total += sum_of_kl(original_TV, logits_TV)
            num_tokens += len(logits_TV)
        return total / max(1, num_tokens)


def sum_of_kl(original_TV: Tensor, logits_TV: Tensor) -> float:
    """The sum over tokens of KL(original | other), in nats, from logits. Raises FFSplitError on NaN."""
    total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
    pairs = zip(torch.split(original_TV, KL_ROWS), torch.split(logits_TV, KL_ROWS), strict=True)
    for a_TV, b_TV in pairs:
        a_TV, b_TV = (functional.log_softmax(each.float(), dim=-1) for each in (a_TV, b_TV))
        total += functional.kl_div(b_TV, a_TV, log_target=True, reduction="sum")
    if not bool(torch.isfinite(total)):
        raise FFSplitError("logits on the rows to choose by are not finite: give a wider --dtype")
    return max(0.0, float(total))


class _Down:
    """The down projection of an FFN in a model. Neurons that are left out get zeros, and so add nothing."""

    def __init__(self, block: nn.Module, paths: FFNPaths) -> None:
        down = block.get_submodule(paths.down)
        self._weight, self._bias = down.get_parameter("weight"), getattr(down, "bias", None)
        self._is_transposed = paths.transposed
        self._whole = [each.data for each in (self._weight, self._bias) if each is not None]

    def put(self, variant: Mapping[str, Tensor] | None) -> None:
        """Put an FFN's down projection in its place, or the original's again."""
        weight, *bias = self._whole
        if variant is not None:
            down_DN = variant["down"].T if self._is_transposed else variant["down"]
            weight = torch.zeros_like(weight)
            weight.index_copy_(0 if self._is_transposed else 1, variant["neurons"], down_DN)
            bias = [variant.get("bias", each) for each in bias]
        self._weight.data = weight
        if self._bias is not None:
            (self._bias.data,) = bias


class _Prefix:
    """What the blocks gave for each batch. Those before the exchanged FFN give it again, uncomputed.

    For models whose blocks follow each other; others run whole.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, batches: Sequence[Batch]) -> None:
        paths = checkpoint.blocks if checkpoint.can_stream else ()
        self._blocks = {path: base_of(model).get_submodule(path) for path in paths}
        self._outputs: dict[str, list[Any]] = {path: [] for path in paths}
        with self._recording():
            for batch in batches if paths else ():
                predicted_logits(model, batch)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def keep(path: str) -> Callable[..., None]:
            return lambda module, given, output: self._outputs[path].append(output)

        hooks = [block.register_forward_hook(keep(path)) for path, block in self._blocks.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def before(self, block: str, batch: int) -> Iterator[None]:
        """In this context the blocks before one give what they gave for a batch."""
        earlier = list(takewhile(lambda path: path != block, self._blocks)) if block in self._blocks else []
        for path in earlier:
            output = self._outputs[path][batch]
            self._blocks[path].forward = lambda *_, _output=output, **__: _output
        try:
            yield
        finally:
            for path in earlier:
                with suppress(AttributeError):
                    del self._blocks[path].forward


class Tables(NamedTuple):
    """The measured tables of all FFNs: each alone in the original, then around a first solution."""

    alone: tuple[WidthTable, ...]
    around: tuple[WidthTable, ...] = ()

    def curves(self, model: ModelShape, *, multiple: int | None) -> list[Curve]:
        """The curves of all FFNs: the sum over the tables."""
        curves = []
        for layer, shape in enumerate(model.shapes):
            tables = [each[layer] for each in (self.alone, self.around) if each]
            step = width_step(shape, multiple=multiple)
            found = [curve_of(table, step=step, multiple=multiple) for table in tables]
            curves.append(Curve(found[0].widths, np.sum([each.errors for each in found], axis=0)))
        return curves

    def errors_near(self, layouts: Layouts) -> tuple[float, ...]:
        """The error of each FFN alone, at the measured width that is nearest to its layout."""
        widths = nearest_measured(layouts, self.alone)
        pairs = zip(self.alone, widths, strict=True)
        return tuple(table.errors[table.widths.index(width)] for table, width in pairs)


def measure_tables(
    execution: Execution,
    solver: Solver,
    layouts: Layouts,
    statistics: Sequence[NeuronStats],
    shards: Sequence[Result],
    *,
    rows: tuple[str, ...],
) -> Tables:
    """Fit every FFN at some widths and measure the model with each alone, then around a first solution.

    The second table is there because errors do not add up: where all layers are narrow, other widths of
    one layer matter otherwise.
    """
    run = execution.run
    kept = solver.model.elements_of(layouts) / solver.model.ffn_elements
    multiple = solver.multiple
    widths = tuple(measured_widths(shape, kept=kept, multiple=multiple) for shape in solver.model.shapes)
    job = TableJob(
        original=execution.model,
        fitted=_fit_widths(execution, widths, statistics, shards),
        widths=tuple(each[:-1] for each in widths),
        around=None,
        rows=rows,
        max_length=run.recipe.calibration.row_length,
        batch_tokens=run.recipe.calibration.compared_tokens,
        scratch=execution.scratch.part("tables/alone"),
        profile=run.profile,
    )
    alone = [(*errors, 0.0) for errors in _measured(execution, "tables", job)]
    first = Tables(tuple(map(WidthTable, widths, alone)))
    try:
        solution = best_layouts(solver, run.budget, first.curves(solver.model, multiple=multiple))
    except BudgetError:
        return first
    scratch = execution.scratch.part("tables/around")
    around = nearest_measured(solution, first.alone)
    again = job.model_copy(update={"around": around, "widths": widths, "scratch": scratch})
    second = _measured(execution, "tables again", again)
    return first._replace(around=tuple(map(WidthTable, widths, second)))


def _fit_widths(
    execution: Execution,
    widths: Sequence[tuple[int, ...]],
    statistics: Sequence[NeuronStats],
    shards: Sequence[Result],
) -> tuple[FileEntry, ...]:
    """The files of all FFNs at all widths but the last, which is the whole FFN."""
    run, checkpoint = execution.run, execution.run.checkpoint
    (step,) = closed_form(run.recipe.steps)

    def kept(layer: int) -> tuple[tuple[int, ...], ...]:
        shape, stats = checkpoint.shapes[layer], statistics[layer : layer + 1]
        layouts = [LayerLayout.dense(shape, width) for width in widths[layer][:-1]]
        return tuple(plan_split(stats, [each], score=run.recipe.score)[0].heavy_neurons for each in layouts)

    jobs = [
        WidthsJob(
            model=execution.model,
            layer=layer,
            neurons=kept(layer),
            step=step,
            inputs=tuple(input_files(shards, ffn.unit)),
            scratch=execution.scratch.part("widths"),
            profile=run.profile,
        )
        for layer, ffn in enumerate(checkpoint.ffns)
    ]
    answers = execution.runner.map_tasks("widths", fit_widths_job, jobs)
    key = stage_key("widths", {"run": run.keys.run})
    return tuple(
        each.files[0] for each in execution.log.collect("widths", key, len(jobs), answers, unit="layers")
    )


def _measured(execution: Execution, stage: str, job: TableJob) -> list[tuple[float, ...]]:
    items = [TableItem(layer=layer) for layer in range(len(job.widths))]
    answers = execution.runner.map_workers(stage, partial(TableWorker, job), items)
    key = stage_key(stage, {"run": execution.run.keys.run})
    results = execution.log.collect(stage, key, len(items), answers, unit="layers")
    return [tuple(map(float, result.facts["errors"])) for result in results]  # type: ignore[arg-type]
