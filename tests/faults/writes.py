"""Processes that end between two writes to a store, as by SIGKILL: nothing is cleared up after them.

A run is carried out in a process of its own whose store counts what it writes and deletes, and which ends
after the n-th. Every write is noted in a file before it counts, and what the run logs is in another.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ffsplit
from ffsplit import logs
from ffsplit.store.local import LocalStore
from ffsplit.store.store import root_uri

WRITES = ("put_bytes", "put_file", "put_if_absent", "delete", "delete_prefix")
KILLED = 137
PRELOADED = [
    "accelerate",
    "sklearn.metrics",
    "transformers.modeling_utils",
    "transformers.models.auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "ffsplit.run.pipeline",
    "ffsplit.run.driver",
    "tests.faults.writes",
]
"""What a run imports, in part only when it comes to that."""


@dataclass
class Ended:
    """How a process ended: what it wrote, in order, as `method key`, and the events that it logged."""

    exit_code: int
    writes: list[str]
    events: list[dict[str, Any]]

    def items(self, event: str) -> set[tuple[str, str]]:
        """The stage and the item of every event of a name."""
        found = [each for each in self.events if each["event"] == event]
        return {(each.get("stage") or "", each.get("item") or "") for each in found}

    def notes(self) -> str:
        return "\n".join(each.get("message", "") for each in self.events)


def store_class(uri: str) -> type[Any]:
    if root_uri(uri).startswith("s3://"):
        from ffsplit.store.s3 import S3Store

        return S3Store
    return LocalStore


def counting(uri: str, log: Path, *, after: int | None, only: str) -> None:
    """Have the stores of this process note their writes to keys with `only` in them, and end it after n.

    With 0 it ends before the first.
    """
    lock = threading.Lock()
    num_left = [after]

    def wrap(original: Callable[..., Any], method: str) -> Callable[..., Any]:
        def write(self: Any, key: str, *arguments: Any) -> Any:
            if only not in key:
                return original(self, key, *arguments)
            with lock:  # a kill is between two writes, also of several threads
                if num_left[0] == 0:
                    os._exit(KILLED)
                answer = original(self, key, *arguments)
                with log.open("a") as file:
                    file.write(f"{method} {key}\n")
                if num_left[0] is not None:
                    num_left[0] -= 1
                    if num_left[0] == 0:
                        os._exit(KILLED)
                return answer

        return write

    kind = store_class(uri)
    for method in WRITES:
        setattr(kind, method, wrap(getattr(kind, method), method))


def _carry_out(work: Callable[[], object], uri: str, folder: Path, after: int | None, only: str) -> None:
    with (folder / "events").open("a") as file:
        os.dup2(file.fileno(), 2)
    logs.ask_for("json")
    counting(uri, folder / "writes", after=after, only=only)
    work()


@dataclass
class Writers:
    """Starts processes out of one that has imported everything already."""

    processes: Any

    @classmethod
    def ready(cls) -> Writers:
        processes = get_context("forkserver")
        processes.set_forkserver_preload(PRELOADED)
        return cls(processes)

    def do(
        self, work: Callable[[], object], uri: str, folder: Path, *, after: int | None = None, only: str = ""
    ) -> Ended:
        """Carry out some work in a process of its own, which ends after its n-th write if it is told to."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = dict(os.environ)
        child = self.processes.Process(
            target=_in_environment, args=(environment, _carry_out, work, uri, folder, after, only)
        )
        child.start()
        child.join(240)
        assert child.exitcode is not None, "it hangs"
        return Ended(child.exitcode, _lines(folder / "writes"), list(_events(folder / "events")))

    def run(self, config: ffsplit.JobConfig, folder: Path, **options: Any) -> Ended:
        """Carry out a run."""
        return self.do(partial(ffsplit.compress, config), config.out, folder, **options)


def _in_environment(environment: dict[str, str], work: Callable[..., object], *arguments: Any) -> None:
    """The fork server has the environment of when it was started."""
    os.environ.update(environment)
    work(*arguments)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _events(path: Path) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in _lines(path) if line.startswith('{"time"'))
