"""Processes that each try one model type at a time, and are replaced when they hang or die."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 180
BUILT = "built"
"""Sent when a model was built: what hangs afterwards is the product's."""


def work(connection: Connection, folder: str, quick: bool) -> None:
    """Check the types that arrive, until None does."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks.families.checks import check, emptied, quiet

    quiet()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (progress of thousands of runs)
    while (job := connection.recv()) is not None:
        built = partial(connection.send, BUILT)
        connection.send(check(*job, emptied(Path(folder)), quick=quick, built=built))


class Worker:
    """A process that checks one type at a time, and is replaced when it hangs or dies."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder, self._quick = folder, quick
        self.job: tuple[str, str] | None = None
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, str(self._folder), self._quick))
        self._process.start()
        theirs.close()

    def give(self, job: tuple[str, str]) -> None:
        self.job, self._deadline, self._built = job, time.monotonic() + TIMEOUT_S, False
        self.connection.send(job)

    def result(self) -> dict[str, Any] | None:
        """What became of its job, or None if it still works on it."""
        assert self.job is not None
        why = ""
        if self.connection.poll():
            try:
                received = self.connection.recv()
                if received != BUILT:
                    return self._done(received)
                self._built = True
            except EOFError:
                why = "the process died"
        elif time.monotonic() > self._deadline:
            why = f"not ready after {TIMEOUT_S} s"
        if not why:
            return None
        self.stop()
        model_type, class_name = self.job
        self._start()
        record = {"type": model_type, "class": class_name, "quick": self._quick}
        return self._done({**record, "outcome": "traceback" if self._built else "not built", "why": why})

    def _done(self, record: dict[str, Any]) -> dict[str, Any]:
        self.job = None
        return record

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()
