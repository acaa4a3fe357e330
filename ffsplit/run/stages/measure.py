"""Measurement: original and compressed side by side, in one process that does nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffsplit import logs
from ffsplit.calibration.readers import MediaReader, Reader, make_reader
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.errors import UnsupportedModelError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.keys import stage_key
from ffsplit.machine import describe_hardware
from ffsplit.measurement.fidelity import fidelity, streamed_fidelity
from ffsplit.measurement.gates import speed_limits
from ffsplit.measurement.latency import load_average, load_since, paired_latency
from ffsplit.measurement.memory import peak_memory_bytes
from ffsplit.measurement.size import compressed_size, original_size
from ffsplit.measurement.tasks.evaluations import Evaluation, score_evaluations
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import forget_caches, load_tokenizer, load_with_missing
from ffsplit.models.streamed import StreamedModel
from ffsplit.models.tensor_files import read_headers
from ffsplit.recipes.recipe import MeasurementSettings
from ffsplit.store.beacon import Beacon, Tell
from ffsplit.store.manifest import Measurements, TaskScore

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution

NOT_HELD = "latency and peak memory: the models were measured one block at a time, not held whole"

NOT_MADE_UP = "peak memory: it is measured on made-up inputs, which this model cannot read"


class MeasureJob(Record):
    """What to compare, and on which text."""

    original: ModelSource
    compressed: ModelSource
    layouts: tuple[LayerLayout, ...]
    held_out: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    max_length: int
    batch_tokens: int
    settings: MeasurementSettings
    speed_limits: tuple[tuple[tuple[int, int] | None, float], ...] = ()
    """The speed-ups that gates require, at one shape or at every shape."""
    profile: ComputeProfile
    block_by_block: bool = False
    beacon: Beacon
    """Where the worker tells which part it is at."""


def measure_job(job: MeasureJob) -> Measurements:
    """Size, fidelity on held-out text, latency, task scores and peak memory of both models."""
    with job.profile.applied():
        return _measure(job)


def _measure(job: MeasureJob) -> Measurements:
    checkpoint = job.original.checkpoint()
    compressed = job.compressed.directory()
    companions = checkpoint.folder.files.companions
    weights = [path for path in compressed.glob("*.safetensors") if path.name not in companions]
    empty = Measurements(
        original_size=original_size(checkpoint),
        compressed_size=compressed_size(
            checkpoint, job.layouts, file_bytes=sum(path.stat().st_size for path in weights)
        ),
        fidelity={},
        latency=(),
        original_peak_memory_bytes=None,
        compressed_peak_memory_bytes=None,
        device=job.profile.device,
        dtype=job.profile.dtype,
        num_threads=job.profile.threads,
        hardware=describe_hardware(),
    )
    measure = _block_by_block if job.block_by_block else _side_by_side
    return empty.model_copy(update=measure(job, checkpoint, compressed))


class Clock:
    """How long each part took, from the end of the one before it. Tells which one runs."""

    def __init__(self, parts: Sequence[str], tell: Tell) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()
        self._parts, self._tell = parts, tell

    def ended(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(now - self._since, 3)
        self._since = now
        logs.log("measured", part=part, seconds=self.seconds[part])
        if len(self.seconds) < len(self._parts):
            self._tell(len(self.seconds), len(self._parts), self._parts[len(self.seconds)])


def _side_by_side(job: MeasureJob, checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """All measurements, with both models in memory."""
    parts = ["loading", "fidelity", "latency", *(["tasks"] if job.evaluations else []), "peak memory"]
    clock = Clock(parts, job.beacon.teller(every_s=0))
    directories = (checkpoint.directory, directory)
    dtype, device = getattr(torch, job.profile.dtype), torch.device(job.profile.device)
    (original, absent), (compressed, missing) = (
        load_with_missing(each, checkpoint.class_name, dtype=dtype) for each in directories
    )
    if lost := sorted(missing - absent):
        raise UnsupportedModelError(
            f"the compressed {checkpoint.architecture.model_type} does not load: transformers finds no "
            f"tensor for {lost[0]} ({len(lost)} such tensors), and would make it up: use fast or norm-prune"
        )
    for model in (original, compressed):
        model.to(device)
        forget_caches(model)
    clock.ended("loading")
    reader = _reader(job, checkpoint)
    encoded = reader.encode(job.held_out)
    batches = list(reader.batches(encoded))

    def example(num_rows: int) -> Mapping[str, Tensor]:
        rows = [encoded[index % len(encoded)] for index in range(num_rows)]
        assert isinstance(reader, MediaReader)
        return reader.batch(rows).to(device, dtype=dtype).arguments

    on_device = (batch.to(device, dtype=dtype) for batch in batches)
    scores = fidelity(original, compressed, on_device, makes=checkpoint.compared_as) if batches else {}
    clock.ended("fidelity")
    before = load_average()
    latency = paired_latency(
        original,
        compressed,
        shapes=_shapes(job, checkpoint),
        num_pairs=job.settings.latency_pairs,
        limits=job.speed_limits,
        example=example if checkpoint.reads_jointly else None,
    )
    load = load_since(before)
    clock.ended("latency")
    tasks: tuple[TaskScore, ...] = ()
    if job.evaluations:
        tasks = score_evaluations(job.evaluations, original, compressed, load_tokenizer(checkpoint))
        clock.ended("tasks")
    del original, compressed
    peaks = (None, None) if checkpoint.reads_jointly else _peak_memory(job, checkpoint, directories)
    clock.ended("peak memory")
    return {
        "seconds": clock.seconds,
        "skipped": (NOT_MADE_UP,) if checkpoint.reads_jointly and job.settings.peak_memory else (),
        "fidelity": scores,
        "latency": latency,
        "load": load,
        "tasks": tasks,
        "original_peak_memory_bytes": peaks[0],
        "compressed_peak_memory_bytes": peaks[1],
    }


def _block_by_block(job: MeasureJob, checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Only fidelity, with one block of one model in memory at a time."""
    dtype, device = getattr(torch, job.profile.dtype), torch.device(job.profile.device)
    reader = _reader(job, checkpoint)
    batches = list(reader.batches(reader.encode(job.held_out)))
    measured: dict[str, Any] = {"skipped": (NOT_HELD,)}
    if batches:
        both = (checkpoint, replace(checkpoint, directory=directory, tensors=read_headers(directory)))
        class_name = None if checkpoint.is_headless else checkpoint.class_name
        original, compressed = (
            StreamedModel(each, device=device, dtype=dtype, class_name=class_name) for each in both
        )
        scores, blocks = streamed_fidelity(original, compressed, batches, makes=checkpoint.compared_as)
        measured |= {"fidelity": scores, "blocks": blocks}
    return measured


def _reader(job: MeasureJob, checkpoint: Checkpoint) -> Reader:
    return make_reader(checkpoint, max_length=job.max_length, batch_tokens=job.batch_tokens)


def _peak_memory(
    job: MeasureJob, checkpoint: Checkpoint, directories: tuple[Path, Path]
) -> tuple[int | None, int | None]:
    """Peak bytes of the original and of the compressed model at the largest shape."""
    if not job.settings.peak_memory:
        return None, None
    original, compressed = (
        peak_memory_bytes(
            directory,
            checkpoint.class_name,
            shape=max(_shapes(job, checkpoint), key=lambda shape: shape[0] * shape[1]),
            device=job.profile.device,
            dtype=job.profile.dtype,
        )
        for directory in directories
    )
    return original, compressed


def _shapes(job: MeasureJob, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """The shapes to time, no row longer than the model can read."""
    longest = checkpoint.max_positions
    shapes = job.settings.latency_shapes
    within = [(rows, tokens if longest is None else min(tokens, longest)) for rows, tokens in shapes]
    return list(dict.fromkeys(within))


def measure(execution: Execution, compressed: Path, layouts: tuple[LayerLayout, ...]) -> Measurements:
    """Compare the checkpoint in a directory with the original."""
    run, calibration = execution.run, execution.run.recipe.calibration
    job = MeasureJob(
        original=execution.model,
        compressed=execution.hand_over(compressed),
        layouts=layouts,
        held_out=execution.text.held_out,
        evaluations=run.evaluations,
        max_length=calibration.row_length,
        batch_tokens=calibration.compared_tokens,
        settings=run.measurement,
        speed_limits=speed_limits(run.gates),
        profile=run.profile,
        block_by_block=run.needs.measured_block_by_block,
        beacon=Beacon(scratch=execution.scratch, name="measure"),
    )
    key = stage_key("measure", {"run": run.keys.run})
    with execution.log.stage("measure", key, num_items=1, beacon=job.beacon):
        found = execution.runner.run_alone("measure", measure_job, job, reserved=True)
    if found.seconds:
        execution.log.note(f"measure: {', '.join(f'{part} {s:.1f} s' for part, s in found.seconds.items())}")
    return found
