"""What a pre-flight says: the needs of every stage, of the disks, and what cannot be done."""

from __future__ import annotations

import os
from collections.abc import Callable

from pydantic import Field, computed_field

from ffsplit.artifacts.entries import LeftOut
from ffsplit.config import JobConfig, Record
from ffsplit.errors import ConfigError
from ffsplit.machine import memory_limit_bytes, num_workers_here
from ffsplit.stages.profile import ComputeProfile

SHARE_OF_MEMORY = 0.9
"""Of the machine's; the rest is the system's."""


class Machine(Record):
    """How many workers run at once, and the memory that each of them, or one alone, may use.

    None where another machine decides, or a GPU.
    """

    num_workers: int
    worker_bytes: int | None
    alone_bytes: int | None
    is_elsewhere: bool = Field(default=False, description="a cluster, where hosts hand files to each other")
    is_one_process: bool = Field(default=False, description="every stage runs in this process")

    @classmethod
    def of(cls, config: JobConfig, profile: ComputeProfile, *, fits: Callable[[int], bool]) -> Machine:
        """This machine's, or what --memory-per-worker says.

        `fits` says whether so many bytes are enough for a worker: unless --workers says how many there are
        to be, they are the most that this machine has cores and memory for.
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
        return cls(
            num_workers=workers,
            worker_bytes=worker_bytes,
            alone_bytes=alone_bytes,
            is_elsewhere=elsewhere,
            is_one_process=serial,
        )


class StageNeeds(Record):
    """What one stage takes, about."""

    name: str
    num_workers: int
    memory_bytes: int = Field(description="of one worker")
    available_bytes: int | None = Field(description="for one worker; None where that is not known here")
    seconds: float | None = Field(description="by this machine's speed; None where that is not known here")

    @property
    def fits(self) -> bool:
        return self.available_bytes is None or self.memory_bytes <= self.available_bytes


class DiskNeeds(Record):
    """What is written to one place at most, and what is free there; None where it is no directory.

    Places on one `device` share what is free.
    """

    place: str
    needed_bytes: int
    free_bytes: int | None
    device: int | None = Field(default=None, description="by the system's number")

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


class Totals(Record):
    """Of a whole run: what its fullest stage takes with all workers, every place, and all its stages."""

    memory_bytes: int
    disk_bytes: int
    seconds: float | None = Field(description="None where the speed of another machine decides")


class Preflight(Record):
    """What a run will need, and how it will go about it."""

    model_bytes: int
    machine: Machine
    block_by_block: bool = Field(description="calibration holds one block of the model at a time")
    measured_block_by_block: bool
    stages: tuple[StageNeeds, ...]
    temporary: DiskNeeds
    store: DiskNeeds = Field(description="the scratch and the artifact, while both are there")
    cache: DiskNeeds = Field(description="on each host: a model in a store, what others put together")
    artifact_bytes: int
    left_out: tuple[LeftOut, ...] = Field(
        default=(), description="what of the model's folder does not come along"
    )
    problems: tuple[str, ...] = Field(default=(), description="what cannot be done, and what would mend it")

    def check(self) -> None:
        """Raise ConfigError for the first thing that cannot be done."""
        if self.problems:
            raise ConfigError(self.problems[0])

    @property
    def disks(self) -> dict[str, DiskNeeds]:
        """Every place that something is written to, by what it is."""
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
