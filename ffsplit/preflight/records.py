"""What a pre-flight says: the needs of every stage, of the disks, and what cannot be done."""

from __future__ import annotations

import os
from collections.abc import Callable

from pydantic import Field

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

    @classmethod
    def of(cls, config: JobConfig, profile: ComputeProfile, *, fits: Callable[[int], bool]) -> Machine:
        """This machine's, or what --memory-per-worker says.

        `fits` says whether so many bytes are enough for a worker: unless --workers says how many there are
        to be, they are the most that this machine has cores and memory for.
        """
        given = config.memory_per_worker
        elsewhere = config.runner == "ray" and (config.address or os.environ.get("RAY_ADDRESS"))
        on_gpu = profile.device == "cuda"
        if config.runner == "serial":
            workers = 1
        elif elsewhere and config.workers is not None:
            workers = config.workers
        else:
            workers = num_workers_here(config.workers, threads=profile.threads, on_gpu=on_gpu)
        if given is not None or elsewhere or on_gpu:
            return cls(num_workers=workers, worker_bytes=given, alone_bytes=given)
        usable = int(memory_limit_bytes() * SHARE_OF_MEMORY)
        if config.workers is None:
            workers = next((fewer for fewer in range(workers, 1, -1) if fits(usable // fewer)), 1)
        return cls(num_workers=workers, worker_bytes=usable // workers, alone_bytes=usable)


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
    """What is written to one place at most, and what is free there; None where it is no directory."""

    place: str
    needed_bytes: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


class Preflight(Record):
    """What a run will need, and how it will go about it."""

    model_bytes: int
    machine: Machine
    block_by_block: bool = Field(description="calibration holds one block of the model at a time")
    measured_block_by_block: bool
    stages: tuple[StageNeeds, ...]
    temporary: DiskNeeds
    store: DiskNeeds = Field(description="the scratch and the artifact, while both are there")
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
    def seconds(self) -> float | None:
        parts = [stage.seconds for stage in self.stages]
        return None if None in parts else sum(part for part in parts if part is not None)
