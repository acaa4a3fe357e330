"""Fits: one task per layer, which reads only its tensors and sampled inputs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffsplit.compressors import AnyCompressor, DistillCompressor
from ffsplit.compressors.base import LayerContext
from ffsplit.compressors.layer import CompressedLayer, compress_layer, refit_layer
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.directories import temporary_folder
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.keys import stage_key
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.run.checks import can_refit
from ffsplit.run.stages.calibrate import input_files, sample_inputs
from ffsplit.runtime.assemble import assemble, keeps_names
from ffsplit.runtime.ffn_tensors import layer_tensors, load_activation, load_ffn, load_output_norm
from ffsplit.splitting.scores import FEWEST_TOKENS, LayerPlan
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution


Job = TypeVar("Job")


class Layers(NamedTuple):
    """The compressed layers of a model: the layout and the error of each, and their files.

    A dropped expert has no file and no error.
    """

    files: tuple[Path, ...]
    layouts: tuple[LayerLayout, ...]
    errors: tuple[float | None, ...]


class LayerJob(Record):
    """One layer's plan and where its inputs are. `becomes` is the FFN whose names it gets in the artifact."""

    model: ModelSource
    plan: LayerPlan
    becomes: int
    steps: tuple[AnyCompressor, ...]
    plain: bool
    inputs: tuple[FileEntry, ...]
    scratch: Scratch
    profile: ComputeProfile

    @property
    def name(self) -> str:
        return _layer_name(self.plan.layer)


class RefitJob(Record):
    """A layer of a compressed model, and where both models' inputs to it are, for the same tokens."""

    original: ModelSource
    compressed: ModelSource
    layer: int
    step: DistillCompressor
    inputs: tuple[FileEntry, ...]
    own_inputs: tuple[FileEntry, ...]
    scratch: Scratch
    profile: ComputeProfile

    @property
    def name(self) -> str:
        return _layer_name(self.layer)


def compress_layer_job(job: LayerJob) -> Result:
    """Compress one layer into one safetensors file in the scratch."""
    with job.profile.applied():
        return job.scratch.load_or_compute(job.name, lambda: _compress(job))


def refit_layer_job(job: RefitJob) -> Result:
    """Refit one layer of a compressed model, into a file like that of `compress_layer_job`."""
    with job.profile.applied():
        return job.scratch.load_or_compute(job.name, lambda: _refit(job))


def _layer_name(layer: int) -> str:
    return f"layer-{layer:03d}"


def _sampled(job: LayerJob | RefitJob, entry: FileEntry) -> dict[str, Tensor]:
    """This layer's inputs in one shard."""
    with job.scratch.reading(entry) as path:
        tensors: dict[str, Tensor] = load_file(path, device=job.profile.device)
    return tensors


def _inputs(shards: Sequence[Mapping[str, Tensor]], expert: int | None) -> list[Tensor]:
    """The sampled inputs [T, D] of an FFN in float32; for an expert, those of the tokens routed to it.

    If those are too few, all inputs of its block are used: any of them might be routed to it.
    """
    inputs = [shard["input"].float() for shard in shards]
    if expert is None:
        return inputs
    own = [x_TD[shard["experts"].eq(expert).any(1)] for x_TD, shard in zip(inputs, shards, strict=True)]
    return own if sum(map(len, own)) >= FEWEST_TOKENS else inputs


def _compress(job: LayerJob) -> Result:
    device = torch.device(job.profile.device)
    checkpoint = job.model.checkpoint(uneven=True)
    expert = checkpoint.ffns[job.plan.layer].expert
    inputs = _inputs([_sampled(job, entry) for entry in job.inputs], expert)
    activation = load_activation(checkpoint, job.plan.layer, device=device)
    compressed = compress_layer(
        load_ffn(checkpoint, job.plan.layer, activation=activation, device=device),
        heavy_neurons=job.plan.heavy_neurons,
        layout=job.plan.layout,
        steps=job.steps,
        inputs=inputs,
        output_norm=load_output_norm(checkpoint, job.plan.layer, device=device),
    )
    tensors = layer_tensors(checkpoint, job.becomes, compressed.weights, plain=job.plain)
    return _saved(job, job.plan.layer, compressed, tensors)


def _refit(job: RefitJob) -> Result:
    device = torch.device(job.profile.device)
    original, compressed = (each.checkpoint(uneven=True) for each in (job.original, job.compressed))
    activation = load_activation(original, job.layer, device=device)
    ffn, narrow = (
        load_ffn(each, job.layer, activation=activation, device=device) for each in (original, compressed)
    )
    inputs, own_inputs = (
        _inputs([_sampled(job, entry) for entry in entries], expert=None)
        for entries in (job.inputs, job.own_inputs)
    )
    norm = load_output_norm(original, job.layer, device=device)
    fitted = refit_layer(narrow, job.step, context=LayerContext(ffn, inputs, norm, own_inputs))
    tensors = layer_tensors(compressed, job.layer, fitted.weights, plain=True)
    return _saved(job, job.layer, fitted, tensors)


def _saved(
    job: LayerJob | RefitJob, layer: int, compressed: CompressedLayer, tensors: dict[str, Tensor]
) -> Result:
    with temporary_folder() as folder:
        path = folder / f"{job.name}.safetensors"
        save_file(tensors, path, {"format": "pt"})
        layout = compressed.weights.layout.model_dump(mode="json")
        facts: dict[str, JsonValue] = {
            "layer": layer,
            "relative_error": compressed.relative_error,
            "layout": layout,
        }
        return job.scratch.save(job.name, {path.name: path}, facts=facts)


def compress_layers(
    execution: Execution,
    stage: str,
    checkpoint: Checkpoint,
    steps: tuple[AnyCompressor, ...],
    plans: tuple[LayerPlan, ...],
    shards: Sequence[Result],
    *,
    part: str,
) -> Layers:
    """Compress every layer of a checkpoint that is not dropped, one task each.

    `shards` hold the sampled inputs.
    """
    jobs = layer_jobs(execution, checkpoint, steps, plans, shards, part=part)
    planned = [plan.model_dump(mode="json") for plan in plans]
    key = stage_key(stage, {"run": execution.run.keys.run, "plans": planned})
    answers = execution.runner.map_tasks(stage, compress_layer_job, jobs)
    found = _layers(execution, execution.log.collect(stage, key, len(jobs), answers, unit="layers"))
    return _among_dropped(found, plans)


def _among_dropped(found: Layers, plans: Sequence[LayerPlan]) -> Layers:
    """The layers with those between them that are dropped."""
    layouts, errors = iter(found.layouts), iter(found.errors)
    is_dropped = [plan.layout.is_dropped for plan in plans]
    return Layers(
        files=found.files,
        layouts=tuple(LayerLayout.dropped() if dropped else next(layouts) for dropped in is_dropped),
        errors=tuple(None if dropped else next(errors) for dropped in is_dropped),
    )


def layer_jobs(
    execution: Execution,
    checkpoint: Checkpoint,
    steps: tuple[AnyCompressor, ...],
    plans: tuple[LayerPlan, ...],
    shards: Sequence[Result],
    *,
    part: str,
) -> list[LayerJob]:
    """One job per plan of an FFN that is not dropped; the results go to `part` of the scratch."""
    run = execution.run
    plain, becomes = keeps_names(checkpoint, [plan.layout for plan in plans]), _places(checkpoint, plans)
    ours = checkpoint.directory == run.checkpoint.directory
    model = execution.model if ours else execution.hand_over(checkpoint.directory)
    return [
        LayerJob(
            model=model,
            plan=plan,
            becomes=becomes[plan.layer],
            steps=steps,
            plain=plain,
            inputs=tuple(input_files(shards, checkpoint.ffns[plan.layer].unit)),
            scratch=execution.scratch.part(part),
            profile=run.profile,
        )
        for plan in plans
        if not plan.layout.is_dropped
    ]


def _places(checkpoint: Checkpoint, plans: Sequence[LayerPlan]) -> dict[int, int]:
    """By the index of each FFN that stays: the index of the FFN in whose place the artifact has it.

    Experts that stay move up to the places of those that are dropped before them.
    """
    places: dict[int, int] = {}
    next_free: dict[int, int] = {}
    for plan in plans:
        unit = checkpoint.ffns[plan.layer].unit
        if not plan.layout.is_dropped:
            places[plan.layer] = next_free.setdefault(unit, unit)
            next_free[unit] += 1
    return places


def refit_layers(execution: Execution, layers: Layers, shards: Sequence[Result], staging: Path) -> Layers:
    """Refit all layers to the compressed model's own inputs, as often as the recipe says.

    So far each was fitted to the original's inputs, which `shards` hold. For each refit, the compressed model
    is assembled beside `staging`, and its inputs for the same tokens are sampled. The layers are then
    independent again. A result that is not an ordinary model is not refitted.
    """
    run = execution.run
    if not can_refit(run.checkpoint, layers.layouts):
        return layers
    for number, step in enumerate(run.recipe.refits, start=1):
        compressed = staging.with_name(f"refit-{number}")
        assemble(run.checkpoint, layers.files, layers.layouts, compressed)
        layers = _refit_once(execution, number, step, compressed, shards)._replace(layouts=layers.layouts)
        shutil.rmtree(compressed)
    return layers


def _refit_once(
    execution: Execution, number: int, step: DistillCompressor, compressed: Path, shards: Sequence[Result]
) -> Layers:
    run, part = execution.run, f"refit-{number}"
    key = stage_key("refit", {"run": run.keys.run, "number": number})
    model = execution.hand_over(compressed)
    own = sample_inputs(execution, model, part=f"{part}/sample", key=key)
    jobs = [
        RefitJob(
            original=execution.model,
            compressed=model,
            layer=layer,
            step=step,
            inputs=tuple(input_files(shards, ffn.unit)),
            own_inputs=tuple(input_files(own, ffn.unit)),
            scratch=execution.scratch.part(part),
            profile=run.profile,
        )
        for layer, ffn in enumerate(run.checkpoint.ffns)
    ]
    answers = execution.runner.map_tasks("refit", refit_layer_job, jobs)
    return _layers(execution, execution.log.collect("refit", key, len(jobs), answers, unit="layers"))


def _layers(execution: Execution, results: Sequence[Result]) -> Layers:
    """What a stage's tasks left in the scratch."""
    return Layers(
        files=tuple(execution.scratch.path(result.files[0]) for result in results),
        layouts=tuple(LayerLayout.model_validate(result.facts["layout"]) for result in results),
        errors=tuple(
            None if (error := result.facts["relative_error"]) is None else float(str(error))
            for result in results
        ),
    )
