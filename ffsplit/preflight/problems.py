"""What cannot be done, each in one line that names the setting that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator

from ffsplit.preflight.records import Preflight, StageNeeds
from ffsplit.preflight.workload import Workload

GB = 1e9
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
            yield (
                f"recipe {work.recipe.name} searches, which needs both models whole, and they do not fit"
                f"{room}: set allocation: uniform in a copy of it, or {KNOWN_BETTER}"
            )
    for disk, name, mend in (
        (flight.temporary, "temporary files in", "set TMPDIR to a directory on a larger disk"),
        (flight.store, "--out", "free some, or give a place on a larger disk"),
    ):
        if not disk.fits:
            free = _size(disk.free_bytes or 0)
            yield f"{name} {disk.place} need about {_size(disk.needed_bytes)}, and {free} are free: {mend}"


def _too_little_memory(stage: StageNeeds, flight: Preflight, work: Workload) -> str:
    available = stage.available_bytes or 0
    said = f"{stage.name} needs about {_size(stage.memory_bytes)} a worker, and {_size(available)} are there"
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
