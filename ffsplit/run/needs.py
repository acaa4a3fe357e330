"""What a run needs, as records: every stage, the disks, and the problems."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from pydantic import Field, computed_field

from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import JobConfig, Record
from ffsplit.errors import ConfigError
from ffsplit.machine import gpus_here, memory_limit_bytes, num_workers_here
from ffsplit.report.humanize import duration, size
from ffsplit.run.healing_memory import bytes_of_a_gpu, fewest_gpus
from ffsplit.run.workload import Workload
from ffsplit.store.entries import LeftOut

SHARE_OF_MEMORY = 0.9
"""The part of the machine's memory that a run may use; the rest is for the system."""


class Machine(Record):
    """How many workers run at once, and the memory that each of them, or one alone, may use.

    None if another machine or a GPU decides that.
    """

    num_workers: int
    worker_bytes: int | None
    alone_bytes: int | None
    is_elsewhere: bool = Field(default=False, description="a cluster, whose hosts hand files to each other")
    is_one_process: bool = Field(default=False, description="every stage runs in this process")
    healing_workers: int = 1
    num_gpus: int | None = Field(default=None, description="that workers on GPUs may use; None if not known")
    gpu_bytes: int | None = Field(default=None, description="of one GPU that healing may use")

    @classmethod
    def of(cls, config: JobConfig, profile: ComputeProfile, *, fits: Callable[[int], bool]) -> Machine:
        """This machine's limits, or what --memory-per-worker gives.

        `fits` tells whether a number of bytes is enough for one worker. Without --workers, there are as many
        workers as this machine has cores and memory for.
        """
        given = config.memory_per_worker
        elsewhere = config.runner == "ray" and bool(config.address or os.environ.get("RAY_ADDRESS"))
        serial = config.runner == "serial"
        on_gpu = profile.device == "cuda"
        if serial:
            workers = 1
        elif elsewhere and config.workers is not None:
            workers = config.workers
        else:
            workers = num_workers_here(config.workers, threads=profile.threads, on_gpu=on_gpu)
        worker_bytes = alone_bytes = given
        if given is None and not elsewhere and not on_gpu:
            alone_bytes = int(memory_limit_bytes() * SHARE_OF_MEMORY)
            if config.workers is None:
                most = range(workers, 1, -1)
                workers = next((fewer for fewer in most if fits(alone_bytes // fewer)), 1)
            worker_bytes = alone_bytes // workers
        gpus = gpus_here() if on_gpu and not elsewhere else None
        gpu_bytes = given if on_gpu else None
        if gpus is not None and given is None:
            gpu_bytes = int(gpus.smallest_bytes * SHARE_OF_MEMORY)
        return cls(
            healing_workers=config.healing_workers,
            num_gpus=None if gpus is None else gpus.number,
            gpu_bytes=gpu_bytes,
            num_workers=workers,
            worker_bytes=worker_bytes,
            alone_bytes=alone_bytes,
            is_elsewhere=elsewhere,
            is_one_process=serial,
        )


class StageNeeds(Record):
    """What one stage takes, estimated."""

    name: str
    num_workers: int
    memory_bytes: int = Field(description="of one worker")
    available_bytes: int | None = Field(description="for one worker; None if not known here")
    seconds: float | None = Field(description="by this machine's speed; None if not known here")

    @property
    def fits(self) -> bool:
        return self.available_bytes is None or self.memory_bytes <= self.available_bytes


class DiskNeeds(Record):
    """The most bytes written to one place, and the free bytes there (None if it is not a directory).

    Places on the same `device` share the free space.
    """

    place: str
    needed_bytes: int
    free_bytes: int | None
    device: int | None = Field(default=None, description="the system's device number")

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


class Totals(Record):
    """A whole run: memory of its largest stage with all workers, disk of all places, time of all stages."""

    memory_bytes: int
    disk_bytes: int
    seconds: float | None = Field(description="None if it depends on another machine's speed")


class Needs(Record):
    """What a run will need, and whether it runs block by block."""

    model_bytes: int
    machine: Machine
    block_by_block: bool = Field(description="calibration holds one block of the model at a time")
    measured_block_by_block: bool
    stages: tuple[StageNeeds, ...]
    temporary: DiskNeeds
    store: DiskNeeds = Field(description="the scratch and the artifact, while both exist")
    cache: DiskNeeds = Field(description="on each host: a model from a store, what other hosts assembled")
    artifact_bytes: int
    left_out: tuple[LeftOut, ...] = Field(
        default=(), description="files of the model's folder that the artifact leaves out"
    )
    problems: tuple[str, ...] = Field(default=(), description="what cannot be done, and how to fix it")

    def with_problems(self, problems: Iterable[str]) -> Needs:
        """These needs, with their problems."""
        return self.model_copy(update={"problems": tuple(problems)})

    def check(self) -> None:
        """Raise ConfigError for the first problem."""
        if self.problems:
            raise ConfigError(self.problems[0])

    @property
    def disks(self) -> dict[str, DiskNeeds]:
        """Every place that the run writes to, by its purpose."""
        disks = {"temporary files": self.temporary, "the run's files": self.store}
        return disks | ({"cached inputs": self.cache} if self.cache.needed_bytes else {})

    @computed_field  # type: ignore[prop-decorator]
    @property
    def totals(self) -> Totals:
        parts = [stage.seconds for stage in self.stages]
        return Totals(
            memory_bytes=max(stage.num_workers * stage.memory_bytes for stage in self.stages),
            disk_bytes=sum(disk.needed_bytes for disk in self.disks.values()),
            seconds=None if None in parts else sum(part for part in parts if part is not None),
        )


# The estimate as one line of a log.


def in_one_line(needs: Needs, *, asked: int | None = None) -> str:
    """Memory, disk and time, whether it runs block by block, and whether more workers were requested."""
    hungriest = max(needs.stages, key=lambda stage: stage.memory_bytes)
    workers = needs.machine.num_workers
    there = "" if hungriest.available_bytes is None else f" of {size(hungriest.available_bytes)}"
    of_those = f" ({asked} requested, one per core)" if asked is not None and asked > workers else ""
    totals = needs.totals
    parts = [
        f"{workers} worker{'s' if workers > 1 else ''}{of_those}",
        f"up to {size(hungriest.memory_bytes)} of memory each{there}",
        f"{size(needs.temporary.needed_bytes)} of temporary files",
        f"{size(needs.store.needed_bytes)} in {needs.store.place}",
    ]
    if needs.cache.needed_bytes:
        parts.append(f"{size(needs.cache.needed_bytes)} of cached inputs")
    in_all = f"in total {size(totals.memory_bytes)} of memory and {size(totals.disk_bytes)} of disk"
    parts.append(in_all if totals.seconds is None else f"{in_all}, about {duration(totals.seconds)}")
    if needs.block_by_block:
        parts.append("one block of the model at a time")
    return f"pre-flight: {', '.join(parts)}".replace("\u00a0", " ")


# Problems, each in one line that names the setting to change.

GB = 1e9
PEAK_MEMORY = "peak memory"
"""The stage that loads each model once more, in another process."""
GENERATE = "generate"
"""The stage in which the model writes text."""
UNIFORM = "set allocation: uniform in a copy of the recipe"
KNOWN_BETTER = "if a worker may use more, give --memory-per-worker"


def find_problems(needs: Needs, *, work: Workload, num_evaluations: int) -> Iterator[str]:
    """Memory first, then disk."""
    yield from _too_few_gpus(needs)
    for stage in needs.stages:
        if not stage.fits:
            yield _too_little_memory(stage, needs, work)
    if needs.measured_block_by_block:
        alone = needs.machine.alone_bytes
        room = "" if alone is None else f" in {_size(alone)}"
        if num_evaluations:
            yield (
                f"--eval needs both models whole, and they do not fit{room}: leave it out, or {KNOWN_BETTER}"
            )
        if work.recipe.allocation == "search":
            yield f"{_search_needs(work)}, and they do not fit{room}: {UNIFORM}, or {KNOWN_BETTER}"
    yield from _too_little_disk(needs)


def _too_few_gpus(needs: Needs) -> Iterator[str]:
    """Several healing workers take a GPU each."""
    has = needs.machine.num_gpus
    asked = next((stage.num_workers for stage in needs.stages if stage.name == "heal"), 1)
    if has is not None and asked > max(1, has):
        yield (
            f"--healing-workers {asked} takes a GPU for each worker, and this machine has {has}: "
            f"give --healing-workers {max(1, has)}, or the --address of a cluster with {asked} GPUs"
        )


def _too_little_disk(needs: Needs) -> Iterator[str]:
    """Each place by itself, then those that share a disk."""
    disks = (
        (needs.temporary, "temporary files in", "set TMPDIR to a directory on a larger disk"),
        (needs.store, "--out", "free some space, or give a directory on a larger disk"),
        (needs.cache, "cached inputs in", "set FFSPLIT_CACHE to a directory on a larger disk"),
    )
    for disk, name, fix in disks:
        if not disk.fits:
            free = _size(disk.free_bytes or 0)
            yield f"{name} {disk.place} need about {_size(disk.needed_bytes)}, and {free} are free: {fix}"
    for device in {disk.device for disk, _, _ in disks if disk.device is not None}:
        sharing = [(disk, name) for disk, name, _ in disks if disk.device == device and disk.needed_bytes]
        needed = sum(disk.needed_bytes for disk, _ in sharing)
        free_bytes = min((disk.free_bytes or 0 for disk, _ in sharing), default=0)
        if needed > free_bytes and all(disk.fits for disk, _ in sharing):
            named = " and ".join(f"{name} {disk.place}" for disk, name in sharing)
            yield (
                f"{named} share a disk and need about {_size(needed)} together, and {_size(free_bytes)} are "
                "free: free some space, or set TMPDIR to a directory on another disk"
            )


def _search_needs(work: Workload) -> str:
    return f"recipe {work.recipe.name} searches for widths, which needs both models whole"


def _too_little_memory(stage: StageNeeds, needs: Needs, work: Workload) -> str:
    available = stage.available_bytes or 0
    needed = f"{stage.name} needs about {_size(stage.memory_bytes)} per worker"
    problem = f"{needed}, and {_size(available)} are available"
    if stage.name == PEAK_MEMORY:
        return f"{problem}: set measurement.peak_memory: false in a copy of the recipe, or {KNOWN_BETTER}"
    if stage.name in ("allocate", "tables"):
        return f"{problem}: {_search_needs(work)}: {UNIFORM}, or {KNOWN_BETTER}"
    if stage.name == GENERATE:
        return f"{problem}: give --calibration FILE:1, so that the model writes no text, or {KNOWN_BETTER}"
    if stage.name == "heal" and needs.machine.gpu_bytes is not None:
        return _too_small_gpus(stage, needs, work)
    if stage.name == "heal":
        return f"{problem}: use a recipe without healing, such as fast, or {KNOWN_BETTER}"
    alone = needs.machine.alone_bytes or 0
    fitting = alone // stage.memory_bytes
    if 1 <= fitting < stage.num_workers:
        return f"{problem}: give --workers {fitting}, or {KNOWN_BETTER}"
    settings = work.recipe.calibration
    if stage.name == "compress":
        smaller = f"a smaller sampled_tokens (now {settings.sampled_tokens})"
    elif stage.name in ("calibrate", "measure") and work.checkpoint.can_stream:
        dtype = "" if work.itemsize == 2 else "--dtype bfloat16, or "
        smaller = f"{dtype}a smaller batch_tokens (now {settings.tokens_per_batch})"
    else:
        return f"{problem}: use a machine with more memory, or {KNOWN_BETTER}"
    return f"{problem}: give {smaller} in a copy of the recipe, or {KNOWN_BETTER}"


def _too_small_gpus(stage: StageNeeds, needs: Needs, work: Workload) -> str:
    """What would fit: more GPUs of this kind, each with a smaller part."""
    available, plural = stage.available_bytes or 0, "s" if stage.num_workers > 1 else ""
    problem = (
        f"heal needs about {_size(stage.memory_bytes)} per GPU with {stage.num_workers} worker{plural}, "
        f"and {_size(available)} are available"
    )
    enough = fewest_gpus(work, available=available)
    if enough is None:
        return f"{problem}, nor would more such GPUs do: use larger ones, or a recipe without healing"
    each = _size(bytes_of_a_gpu(work, workers=enough))
    return (
        f"{problem}: give --healing-workers {enough}, on as many GPUs (about {each} each), or use a recipe "
        "without healing, such as fast"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2g} GB" if num_bytes < 100 * GB else f"{num_bytes / GB:.0f} GB"
