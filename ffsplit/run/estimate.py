"""Estimates of the memory, disk and time that a run will need, before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.calibration.mixture import OwnRows
from ffsplit.calibration.sampling import TextSample
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import JobConfig
from ffsplit.directories import temporary_root
from ffsplit.errors import explained
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.healing.settings import HealingSettings
from ffsplit.machine import bytes_below, device_of, free_bytes, operations_per_second
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.recipes.recipe import Recipe
from ffsplit.run.checks import can_refit, closed_form
from ffsplit.run.disk import Disk
from ffsplit.run.healing_memory import bytes_of_a_gpu
from ffsplit.run.needs import GENERATE, PEAK_MEMORY, DiskNeeds, Machine, Needs, StageNeeds, find_problems
from ffsplit.run.stage_memory import (
    PROCESS_BYTES,
    calibration_bytes,
    compression_bytes,
    generation_bytes,
    healing_bytes,
    measurement_bytes,
    peak_memory_bytes,
    tables_bytes,
)
from ffsplit.run.workload import ITEM_SIZES, Workload, rows_at_once
from ffsplit.splitting.knapsack import TABLE_TOKENS
from ffsplit.store.cache import Cache, is_remote
from ffsplit.store.scratch import SCRATCH_PREFIX
from ffsplit.store.store import open_store

if TYPE_CHECKING:
    from ffsplit.run.job import Run

# Rough duration of each stage, from its floating-point operations and the bytes it reads.

PROCESS_START_S = 3.0
"""A worker starts and imports its libraries."""
READ_BYTES_PER_S = 1e9
WRITE_BYTES_PER_S = 5e8
REUSED = 0.5
"""Of a forward with one FFN exchanged, what is not known from before: the blocks after it, on average."""
BACKWARD = 2
"""Cost of a backward pass, in forward passes."""


def digest_seconds(work: Workload) -> float:
    """Every byte of the model is read once."""
    return work.file_bytes / READ_BYTES_PER_S


def calibration_seconds(work: Workload, *, workers: int, speed: float, block_by_block: bool) -> float:
    computed = 2 * sum(work.elements_by_block) * work.calibration_tokens / speed
    loads = work.num_shards if block_by_block else workers
    return (computed + loads * work.file_bytes / READ_BYTES_PER_S) / min(workers, work.num_shards)


GENERATION_SHARE = 0.2
"""Of the speed of long batches, what writing token after token reaches."""


def generation_seconds(work: Workload, *, rows: int, workers: int, speed: float) -> float:
    shards = -(-work.own.total // rows)
    computed = 2 * work.num_elements * work.own_tokens / (GENERATION_SHARE * speed)
    return (computed + workers * work.file_bytes / READ_BYTES_PER_S) / min(workers, shards)


def compression_seconds(work: Workload, *, workers: int, speed: float) -> float:
    passes = 2 * work.shape.num_elements * work.sampled_tokens * (1 + work.kept) * 3
    layer = passes + sum(step.operations(work.of_layer) for step in work.recipe.steps)
    if (last := work.recipe.after_healing) is not None:
        layer += last.operations(work.of_layer)
    return layer * work.num_ffns / (speed * min(workers, work.num_ffns))


def search_seconds(work: Workload, *, workers: int, single: float, speed: float) -> float:
    """Every layer is compressed one extra time, and both candidates are evaluated; without tables, each block
    too."""
    tokens = work.validation_tokens
    num_models = 2 if work.measures_widths else work.num_blocks + 2
    evaluation = 2 * 2 * work.num_elements * tokens * num_models / speed
    return compression_seconds(work, workers=workers, speed=single) + evaluation


def tables_seconds(work: Workload, *, num_tokens: int, workers: int, single: float, speed: float) -> float:
    """Every FFN is fitted at some widths, and each is measured twice."""
    num_widths = sum(map(len, work.table_widths))
    tokens = min(num_tokens, work.tokens_of(work.text.validation))
    evaluation = 2 * work.num_elements * tokens / speed * (REUSED if work.checkpoint.can_stream else 1)
    (step,) = closed_form(work.recipe.steps)
    fit = step.operations(work.of_layer) / single
    return num_widths * (2 * evaluation + fit) / min(workers, work.num_ffns)


def measures_tables(work: Workload) -> bool:
    """Whether the run searches for widths by tables."""
    return work.recipe.allocation == "search" and work.measures_widths


def refit_seconds(work: Workload, *, workers: int, speed: float, block_by_block: bool) -> float:
    """Each refit is a pass of the text through the compressed model, and a fit of every layer."""
    passes = calibration_seconds(work, workers=workers, speed=speed, block_by_block=block_by_block)
    fits = work.num_ffns * sum(step.operations(work.of_layer) for step in work.recipe.refits)
    return passes * len(work.recipe.refits) + fits / (speed * min(workers, work.num_ffns))


def healing_seconds(work: Workload, *, speed: float) -> float:
    settings = work.recipe.healing
    assert settings is not None, "only for recipes that heal"
    student = work.compressed_bytes / work.file_bytes
    passes = 1 + (1 + BACKWARD) * student
    tokens = max(work.calibration_tokens * settings.epochs, settings.min_steps * settings.step_tokens)
    return 2 * work.num_elements * tokens * passes / speed


def measurement_seconds(work: Workload, *, speed: float, block_by_block: bool) -> float:
    both = 2 * work.num_elements * (1 + work.compressed_bytes / work.file_bytes)
    tokens = work.held_out_tokens
    if not block_by_block:
        settings = work.recipe.measurement
        tokens += sum(rows * length for rows, length in settings.latency_shapes) * settings.latency_pairs
    return both * tokens / speed + loading_seconds(work)


def loading_seconds(work: Workload) -> float:
    """Loading both models."""
    return (work.file_bytes + work.compressed_bytes) / READ_BYTES_PER_S


def assembly_seconds(work: Workload) -> float:
    """The compressed checkpoint is written once."""
    return work.compressed_bytes / WRITE_BYTES_PER_S


def holds_both(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layouts: tuple[LayerLayout, ...],
    *,
    config: JobConfig,
    profile: ComputeProfile,
) -> bool:
    """Whether a search can hold the original and a candidate in memory, as far as that is known here."""
    work = Workload(
        checkpoint=checkpoint,
        recipe=recipe,
        layouts=layouts,
        text=TextSample((), (), True, ""),
        own=OwnRows(),
        itemsize=ITEM_SIZES[profile.dtype],
        is_one_process=config.runner == "serial",
    )
    limit = Machine.of(config, profile, fits=lambda _: True).alone_bytes
    needed = max(measurement_bytes(work, block_by_block=False), tables_bytes(work, device=profile.device))
    return limit is None or needed <= limit


@explained("the job cannot be checked")
def estimate(run: Run) -> Needs:
    """Estimate what a run needs, and decide whether it runs block by block."""
    config, profile, statistics_only = run.config, run.profile, run.kind == "statistics"
    work = Workload(
        checkpoint=run.checkpoint,
        recipe=run.recipe,
        layouts=run.layouts,
        text=run.sample,
        own=run.own,
        itemsize=ITEM_SIZES[profile.dtype],
        is_one_process=config.runner == "serial",
    )

    def streamed(whole_bytes: int, available: int | None) -> bool:
        is_too_large = available is not None and whole_bytes > available
        return config.block_by_block or (is_too_large and work.checkpoint.can_stream)

    def fits(worker_bytes: int) -> bool:
        whole = calibration_bytes(work, block_by_block=False)
        calibration = calibration_bytes(work, block_by_block=streamed(whole, worker_bytes))
        others = [] if statistics_only else [compression_bytes(work)]
        if not statistics_only and measures_tables(work):
            others.append(tables_bytes(work, device=profile.device))
        return max(calibration, *others) <= worker_bytes

    machine = Machine.of(config, profile, fits=fits)
    calibrates_so = streamed(calibration_bytes(work, block_by_block=False), machine.worker_bytes)
    measures_so = streamed(measurement_bytes(work, block_by_block=False), machine.alone_bytes)
    planned = _Stages.of(work, machine, profile, calibrates_so=calibrates_so, measures_so=measures_so)
    stages = tuple(planned.reading())
    if not statistics_only:
        stages += (*planned.compressing(), *planned.publishing())
    store = open_store(config.out).uri
    disk = Disk(
        work=work,
        workers=machine.num_workers,
        num_refits=len(run.recipe.refits) if can_refit(run.checkpoint, run.layouts) else 0,
        is_streamed=calibrates_so,
        is_remote=is_remote(store),
        is_spread=machine.is_elsewhere,
    )
    cached = disk.cache_bytes(has_stored_model=run.located.stored is not None)
    there = bytes_below(run.checkpoint.directory) if run.located.stored is not None else 0
    if statistics_only:
        temporary, stored = disk.temporary_bytes_of_statistics(), disk.store_bytes_of_statistics()
    else:
        temporary, stored = disk.temporary_bytes(), disk.store_bytes()
    found = Needs(
        model_bytes=work.file_bytes,
        machine=machine,
        block_by_block=calibrates_so,
        measured_block_by_block=measures_so and not statistics_only,
        stages=stages,
        temporary=_disk(str(temporary_root()), temporary),
        store=_disk(store, stored, there=bytes_below(Path(store) / SCRATCH_PREFIX)),
        cache=_disk(
            str(Cache.open().root) if cached else "",
            cached,
            there=there,
            is_here=cached > 0 and not machine.is_elsewhere,
        ),
        artifact_bytes=0 if statistics_only else work.artifact_bytes,
        left_out=() if statistics_only else run.left_out,
    )
    return found.with_problems(find_problems(found, work=work, num_evaluations=len(config.eval)))


def _disk(place: str, needed_bytes: int, *, there: int = 0, is_here: bool = True) -> DiskNeeds:
    """Needed and free bytes of a directory. Bytes `there` already, from an earlier run, count as free."""
    if is_remote(place) or not is_here:
        return DiskNeeds(place=place, needed_bytes=needed_bytes, free_bytes=None)
    free = free_bytes(Path(place)) + there
    return DiskNeeds(place=place, needed_bytes=needed_bytes, free_bytes=free, device=device_of(Path(place)))


@dataclass(frozen=True)
class _Stages:
    """What each stage of a run needs, in their order."""

    work: Workload
    machine: Machine
    profile: ComputeProfile
    calibrates_so: bool
    """Whether the calibration holds one block of the model at a time."""
    measures_so: bool
    speed: float
    """Floating-point operations per second in the dtype of the model."""
    single: float
    """The same in float32."""

    @classmethod
    def of(
        cls,
        work: Workload,
        machine: Machine,
        profile: ComputeProfile,
        *,
        calibrates_so: bool,
        measures_so: bool,
    ) -> _Stages:
        with profile.pinned():
            speed, single = (
                operations_per_second(profile.device, dtype) for dtype in (profile.dtype, "float32")
            )
        return cls(work, machine, profile, calibrates_so, measures_so, speed, single)

    def reading(self) -> Iterator[StageNeeds]:
        """From the model's files to the statistics."""
        work, workers = self.work, self.machine.num_workers
        yield self._alone("digests", PROCESS_BYTES, digest_seconds(work))
        if work.own_tokens:
            length = work.recipe.calibration.row_length
            rows = rows_at_once(work.checkpoint, device=self.profile.device, row_length=length)
            yield self._shared(
                GENERATE,
                generation_bytes(work, rows=min(rows, work.own.total)),
                generation_seconds(work, rows=rows, workers=workers, speed=self.speed),
            )
        seconds = calibration_seconds(
            work, workers=workers, speed=self.speed, block_by_block=self.calibrates_so
        )
        yield self._shared("calibrate", self._calibration_bytes, self._start_s + seconds)

    def compressing(self) -> Iterator[StageNeeds]:
        """From the statistics to the compressed layers."""
        work, workers, memory = self.work, self.machine.num_workers, compression_bytes(self.work)
        if measures_tables(work):
            few, device = TABLE_TOKENS[self.profile.device], self.profile.device
            seconds = tables_seconds(
                work, num_tokens=few, workers=workers, single=self.single, speed=self.speed
            )
            yield self._shared("tables", max(memory, tables_bytes(work, device=device)), seconds)
        if work.recipe.allocation == "search":
            both = max(memory, measurement_bytes(work, block_by_block=False))
            seconds = search_seconds(work, workers=workers, single=self.single, speed=self.speed)
            yield self._alone("allocate", both, seconds)
        seconds = compression_seconds(work, workers=workers, speed=self.single)
        yield self._shared("compress", memory, self._start_s + seconds)
        if work.recipe.refits and can_refit(work.checkpoint, work.layouts):
            seconds = refit_seconds(
                work, workers=workers, speed=self.single, block_by_block=self.calibrates_so
            )
            yield self._shared("refit", max(memory, self._calibration_bytes), 2 * self._start_s + seconds)
        if work.recipe.healing is not None:
            yield self._healing(work.recipe.healing)

    def publishing(self) -> Iterator[StageNeeds]:
        """From the compressed layers to the published artifact."""
        work = self.work
        yield self._alone("assemble", PROCESS_BYTES, assembly_seconds(work))
        memory = measurement_bytes(work, block_by_block=self.measures_so)
        seconds = measurement_seconds(work, speed=self.speed, block_by_block=self.measures_so)
        yield self._alone("measure", memory, self._start_s + seconds)
        if work.recipe.measurement.peak_memory and not self.measures_so:
            seconds = 2 * PROCESS_START_S + loading_seconds(work)  # a process per model
            yield self._alone(PEAK_MEMORY, peak_memory_bytes(work), seconds)
        yield self._alone("publish", PROCESS_BYTES, assembly_seconds(work))

    @property
    def _calibration_bytes(self) -> int:
        return calibration_bytes(self.work, block_by_block=self.calibrates_so)

    @property
    def _start_s(self) -> float:
        return 0.0 if self.work.is_one_process else PROCESS_START_S

    def _alone(self, name: str, memory: int, seconds: float) -> StageNeeds:
        return _needs(name, 1, memory, available=self.machine.alone_bytes, seconds=seconds)

    def _shared(self, name: str, memory: int, seconds: float) -> StageNeeds:
        machine = self.machine
        return _needs(name, machine.num_workers, memory, available=machine.worker_bytes, seconds=seconds)

    def _healing(self, settings: HealingSettings) -> StageNeeds:
        """Several workers divide the models on GPUs, and hold them whole on CPUs."""
        work, machine, profile = self.work, self.machine, self.profile
        on_gpu = profile.device == "cuda"
        dtype = "bfloat16" if on_gpu and settings.mixed_precision == "bf16" else "float32"
        workers = 1 if work.is_one_process or not on_gpu else machine.healing_workers
        with profile.pinned():
            seconds = healing_seconds(work, speed=workers * operations_per_second(profile.device, dtype))
        memory = bytes_of_a_gpu(work, workers=workers) if on_gpu else healing_bytes(work)
        available = machine.gpu_bytes if on_gpu else machine.alone_bytes
        return _needs("heal", workers, memory, available=available, seconds=seconds)


def _needs(name: str, workers: int, memory: int, *, available: int | None, seconds: float) -> StageNeeds:
    return StageNeeds(
        name=name,
        num_workers=workers,
        memory_bytes=memory,
        available_bytes=available,
        seconds=seconds if math.isfinite(seconds) else None,
    )
