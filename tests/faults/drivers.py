"""Drivers of runs, each in a process of its own, which takes no time to start."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ffsplit
from ffsplit import logs

LONGEST_S = 600.0
LOOK_EVERY_S = 0.2


def drive(config: ffsplit.JobConfig, log: str) -> None:
    """Carry out a run; what it says goes to a file, as structured lines."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 2)
    logs.ask_for("json")
    ffsplit.compress(config)


@dataclass
class Drivers:
    """Starts drivers out of a process that has imported everything already."""

    processes: Any

    @classmethod
    def ready(cls) -> Drivers:
        processes = get_context("forkserver")
        processes.set_forkserver_preload(
            ["ffsplit.run.driver", "ffsplit.distributed.ray_runner", "tests.faults.drivers"]
        )
        return cls(processes)

    def start(self, config: ffsplit.JobConfig, log: Path) -> Any:
        child = self.processes.Process(target=drive, args=(config, str(log)))
        child.start()
        return child

    def end_of(self, child: Any, *, meanwhile: Callable[[], object]) -> int:
        """Its exit code. Raises TimeoutError when it takes too long."""
        for _ in range(int(LONGEST_S / LOOK_EVERY_S)):
            meanwhile()
            child.join(LOOK_EVERY_S)
            if child.exitcode is not None:
                return int(child.exitcode)
        child.kill()
        raise TimeoutError(f"a driver that was not killed takes longer than {LONGEST_S:g} s")
