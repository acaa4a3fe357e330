"""Runs the cells of a benchmark side by side, a process per card, and stops in time.

A process is given the next cell when its last one has ended. No cell is started that is not expected to end
within the time; one that takes longer than expected is stopped then, and runs again in the next call.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

CellT = TypeVar("CellT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Ended(Generic[CellT, ResultT]):
    """A cell's result, or why there is none; and the seconds that it took."""

    cell: CellT
    result: ResultT | None
    error: str
    wall_s: float


class Host(NamedTuple):
    """What the processes share: cores, `threads` for each (0: as torch likes), and GPUs, taken in turn."""

    num_processes: int
    threads: int
    cards: tuple[str, ...] = ()


def run_grid(
    cells: Sequence[CellT],
    function: Callable[[CellT], ResultT],
    *,
    host: Host,
    expected_s: Callable[[CellT], float] = lambda _: 0.0,
    ends_at: float = float("inf"),
) -> Iterator[Ended[CellT, ResultT]]:
    """The results of `function` as they come. `ends_at` is in the seconds of `time.monotonic`."""
    waiting = list(cells)
    running: dict[Any, tuple[_Slot, CellT, float]] = {}
    slots = [_Slot(function, number, host) for number in range(min(host.num_processes, len(waiting)))]
    idle = list(reversed(slots))
    try:
        while True:
            while idle and (cell := _next(waiting, expected_s, ends_at)) is not None:
                slot = idle.pop()
                slot.link.send(cell)
                running[slot.link] = slot, cell, time.monotonic()
            if not running:
                return
            ready = wait(list(running), timeout=min(max(0.0, ends_at - time.monotonic()), 3600.0))
            for link in ready:
                slot, cell, started = running.pop(link)
                try:
                    result, error = slot.link.recv()
                except EOFError:
                    result, error = None, f"its process ended with code {slot.restart()}"
                idle.append(slot)
                yield Ended(cell, result, error, time.monotonic() - started)
            if not ready and time.monotonic() >= ends_at:
                return
    finally:
        for slot in slots:
            slot.process.terminate()
        for slot in slots:
            slot.process.join()


class _Slot:
    """A process, and the pipe on which it is given cells and answers with their results."""

    process: BaseProcess
    link: Connection

    def __init__(self, function: Callable[[Any], Any], number: int, host: Host) -> None:
        card = host.cards[number % len(host.cards)] if host.cards else None
        self._work = function, card, host.threads
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.link, there = context.Pipe()
        self.process = context.Process(target=_work, args=(there, *self._work), daemon=True)
        self.process.start()
        there.close()  # so that this end reads an end of file when the process dies

    def restart(self) -> int | None:
        """Replace a process that died. Returns its exit code."""
        self.process.join()
        code = self.process.exitcode
        self._start()
        return code


def _next(waiting: list[CellT], expected_s: Callable[[CellT], float], ends_at: float) -> CellT | None:
    """Take the first cell that is expected to end in time."""
    left = ends_at - time.monotonic()
    for index, cell in enumerate(waiting):
        if expected_s(cell) < left:
            return waiting.pop(index)
    return None


def _work(link: Connection, function: Callable[[Any], Any], card: str | None, threads: int) -> None:
    """Run one cell after the other, on one card and with its share of the cores."""
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    if threads:
        import torch

        torch.set_num_threads(threads)
    while True:
        try:
            cell = link.recv()
        except EOFError:
            return
        try:
            link.send((function(cell), ""))
        except Exception as error:  # the other cells go on
            lines = traceback.format_exception_only(error)
            link.send((None, lines[-1].strip()))


def cards_here(wanted: int | None) -> tuple[str, ...]:
    """The first `wanted` of this machine's GPUs, or all of them. Raises ValueError if there are fewer."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if wanted is not None and wanted > len(names):
        raise ValueError(f"--cards {wanted}: this machine has {len(names)}")
    return tuple(names[:wanted])
