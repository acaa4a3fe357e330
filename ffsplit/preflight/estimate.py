"""The estimate of a run on a machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ffsplit.artifacts.cache import Cache
from ffsplit.artifacts.commits import Kind
from ffsplit.artifacts.inputs import is_remote
from ffsplit.artifacts.scratch import SCRATCH_PREFIX
from ffsplit.artifacts.stores import open_store
from ffsplit.errors import explained
from ffsplit.machine import bytes_below, device_of, free_bytes, operations_per_second
from ffsplit.pipeline.examine import Examined
from ffsplit.pipeline.plain import can_refit
from ffsplit.preflight import duration, footprint
from ffsplit.preflight.disk import Disk
from ffsplit.preflight.problems import PEAK_MEMORY, find_problems
from ffsplit.preflight.records import DiskNeeds, Machine, Preflight, StageNeeds
from ffsplit.preflight.workload import ITEM_SIZES, Workload
from ffsplit.stages.profile import ComputeProfile
from ffsplit.temporary import temporary_root


@explained("the job cannot be checked")
def estimate(job: Examined, *, kind: Kind) -> Preflight:
    """What a job needs, and whether it goes block by block."""
    config, profile, statistics_only = job.config, job.profile, kind == "statistics"
    work = Workload(
        checkpoint=job.checkpoint,
        recipe=job.recipe,
        layouts=job.layouts,
        text=job.text,
        itemsize=ITEM_SIZES[profile.dtype],
        is_one_process=config.runner == "serial",
    )

    def streamed(whole_bytes: int, available: int | None) -> bool:
        is_too_large = available is not None and whole_bytes > available
        return config.block_by_block or (is_too_large and work.checkpoint.architecture.can_stream)

    def fits(worker_bytes: int) -> bool:
        whole = footprint.calibration_bytes(work, block_by_block=False)
        calibration = footprint.calibration_bytes(work, block_by_block=streamed(whole, worker_bytes))
        compression = 0 if statistics_only else footprint.compression_bytes(work)
        return max(calibration, compression) <= worker_bytes

    machine = Machine.of(config, profile, fits=fits)
    calibrates_so = streamed(footprint.calibration_bytes(work, block_by_block=False), machine.worker_bytes)
    measures_so = streamed(footprint.measurement_bytes(work, block_by_block=False), machine.alone_bytes)
    stages = tuple(
        _stages(
            work,
            machine,
            profile,
            streamed=(calibrates_so, measures_so),
            statistics_only=statistics_only,
        )
    )
    store = open_store(config.out).uri
    disk = Disk(
        work=work,
        workers=machine.num_workers,
        num_refits=len(job.recipe.refits) if can_refit(job.checkpoint, job.layouts) else 0,
        is_streamed=calibrates_so,
        is_remote=is_remote(store),
        is_spread=machine.is_elsewhere,
    )
    cached = disk.cache_bytes(has_stored_model=job.stored_model is not None)
    there = bytes_below(job.checkpoint.directory) if job.stored_model is not None else 0
    if statistics_only:
        temporary, stored = disk.temporary_bytes_of_statistics(), disk.store_bytes_of_statistics()
    else:
        temporary, stored = disk.temporary_bytes(), disk.store_bytes()
    flight = Preflight(
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
        left_out=() if statistics_only else job.left_out,
    )
    problems = find_problems(flight, work=work, num_evaluations=len(config.eval))
    return flight.model_copy(update={"problems": tuple(problems)})


def _disk(place: str, needed_bytes: int, *, there: int = 0, is_here: bool = True) -> DiskNeeds:
    """What is free in a directory, and what is `there` of it already, as an earlier run's scratch may be."""
    if is_remote(place) or not is_here:
        return DiskNeeds(place=place, needed_bytes=needed_bytes, free_bytes=None)
    free = free_bytes(Path(place)) + there
    return DiskNeeds(place=place, needed_bytes=needed_bytes, free_bytes=free, device=device_of(Path(place)))


def _stages(
    work: Workload,
    machine: Machine,
    profile: ComputeProfile,
    *,
    streamed: tuple[bool, bool],
    statistics_only: bool,
) -> Iterator[StageNeeds]:
    workers = machine.num_workers
    with profile.pinned():
        speed, single = (operations_per_second(profile.device, dtype) for dtype in (profile.dtype, "float32"))

    def needs(name: str, memory: int, seconds: float, *, alone: bool = True) -> StageNeeds:
        return StageNeeds(
            name=name,
            num_workers=1 if alone else workers,
            memory_bytes=memory,
            available_bytes=machine.alone_bytes if alone else machine.worker_bytes,
            seconds=seconds if math.isfinite(seconds) else None,
        )

    yield needs("digests", footprint.PROCESS_BYTES, duration.digest_seconds(work))
    yield needs(
        "calibrate",
        footprint.calibration_bytes(work, block_by_block=streamed[0]),
        duration.calibration_seconds(work, workers=workers, speed=speed, block_by_block=streamed[0]),
        alone=False,
    )
    if statistics_only:
        return
    if work.recipe.allocation == "search":
        yield needs(
            "allocate",
            max(
                footprint.compression_bytes(work),
                footprint.measurement_bytes(work, block_by_block=False),
            ),
            duration.search_seconds(work, workers=workers, single=single, speed=speed),
        )
    yield needs(
        "compress",
        footprint.compression_bytes(work),
        duration.compression_seconds(work, workers=workers, speed=single),
        alone=False,
    )
    if work.recipe.refits and can_refit(work.checkpoint, work.layouts):
        yield needs(
            "refit",
            max(
                footprint.compression_bytes(work),
                footprint.calibration_bytes(work, block_by_block=streamed[0]),
            ),
            duration.refit_seconds(work, workers=workers, speed=single, block_by_block=streamed[0]),
            alone=False,
        )
    if work.recipe.healing is not None:
        yield needs("heal", footprint.healing_bytes(work), duration.healing_seconds(work, speed=single))
    yield needs("assemble", footprint.PROCESS_BYTES, duration.assembly_seconds(work))
    yield needs(
        "measure",
        footprint.measurement_bytes(work, block_by_block=streamed[1]),
        duration.measurement_seconds(work, speed=speed, block_by_block=streamed[1]),
    )
    if work.recipe.measurement.peak_memory and not streamed[1]:
        yield needs(PEAK_MEMORY, footprint.peak_memory_bytes(work), duration.loading_seconds(work))
    yield needs("publish", footprint.PROCESS_BYTES, duration.assembly_seconds(work))
