"""What cannot be done, each in one line that names the setting that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator

from ffsplit.preflight.records import Preflight, StageNeeds
from ffsplit.preflight.workload import Workload

GB = 1e9
PEAK_MEMORY = "peak memory"
"""The stage that loads each model once more, in a process beside the one that waits."""
UNIFORM = "set allocation: uniform in a copy of the recipe"
KNOWN_BETTER = "where that is not so, say what one may use with --memory-per-worker"


def find_problems(flight: Preflight, *, work: Workload, num_evaluations: int) -> Iterator[str]:
    """Memory first, then disk."""
    for stage in flight.stages:
        if not stage.fits:
            yield _too_little_memory(stage, flight, work)
    if flight.measured_block_by_block:
        alone = flight.machine.alone_bytes
        room = "" if alone is None else f" in {_size(alone)}"
        if num_evaluations:
            yield (
                f"--eval needs both models whole, and they do not fit{room}: leave it out, or {KNOWN_BETTER}"
            )
        if work.recipe.allocation == "search":
            yield f"{_search_needs(work)}, and they do not fit{room}: {UNIFORM}, or {KNOWN_BETTER}"
    yield from _too_little_disk(flight)


def _too_little_disk(flight: Preflight) -> Iterator[str]:
    """Each place by itself, then those that share a disk."""
    places = (
        (flight.temporary, "temporary files in", "set TMPDIR to a directory on a larger disk"),
        (flight.store, "--out", "free some, or give a place on a larger disk"),
        (flight.cache, "cached inputs in", "set FFSPLIT_CACHE to a directory on a larger disk"),
    )
    for disk, name, mend in places:
        if not disk.fits:
            free = _size(disk.free_bytes or 0)
            yield f"{name} {disk.place} need about {_size(disk.needed_bytes)}, and {free} are free: {mend}"
    for device in {disk.device for disk, _, _ in places if disk.device is not None}:
        sharing = [(disk, name) for disk, name, _ in places if disk.device == device and disk.needed_bytes]
        needed = sum(disk.needed_bytes for disk, _ in sharing)
        free_bytes = min((disk.free_bytes or 0 for disk, _ in sharing), default=0)
        if needed > free_bytes and all(disk.fits for disk, _ in sharing):
            named = " and ".join(f"{name} {disk.place}" for disk, name in sharing)
            yield (
                f"{named} share a disk and need about {_size(needed)} of it together, and "
                f"{_size(free_bytes)} are free: free some, or set TMPDIR to a directory on another disk"
            )


def _search_needs(work: Workload) -> str:
    return f"recipe {work.recipe.name} searches, which needs both models whole"


def _too_little_memory(stage: StageNeeds, flight: Preflight, work: Workload) -> str:
    available = stage.available_bytes or 0
    said = f"{stage.name} needs about {_size(stage.memory_bytes)} a worker, and {_size(available)} are there"
    if stage.name == PEAK_MEMORY:
        return f"{said}: set measurement.peak_memory: false in a copy of the recipe, or {KNOWN_BETTER}"
    if stage.name == "allocate":
        return f"{said}: {_search_needs(work)}: {UNIFORM}, or {KNOWN_BETTER}"
    if stage.name == "heal":
        return f"{said}: take a recipe without healing, as fast, or {KNOWN_BETTER}"
    alone = flight.machine.alone_bytes or 0
    fitting = alone // stage.memory_bytes
    if 1 <= fitting < stage.num_workers:
        return f"{said}: give --workers {fitting}, or {KNOWN_BETTER}"
    settings = work.recipe.calibration
    if stage.name == "compress":
        smaller = f"a smaller sampled_tokens (now {settings.sampled_tokens})"
    elif stage.name in ("calibrate", "measure") and work.checkpoint.architecture.can_stream:
        dtype = "" if work.itemsize == 2 else "--dtype bfloat16, or "
        smaller = f"{dtype}a smaller batch_tokens (now {settings.batch_tokens})"
    else:
        return f"{said}: take a machine with more, or {KNOWN_BETTER}"
    return f"{said}: give {smaller} in a copy of the recipe, or {KNOWN_BETTER}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2g} GB" if num_bytes < 100 * GB else f"{num_bytes / GB:.0f} GB"
