"""Progress of a run, stage by stage: bars on a terminal, plain lines in a log. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ffsplit import logs, streams
from ffsplit.store.manifest import Stage
from ffsplit.store.scratch import Result
from ffsplit.streams import Stream, stderr

LINE_EVERY_S = 10.0


class Progress:
    """Shows the user what a job is doing. Use as a context manager."""

    def __init__(self, stream: TextIO | Stream | None) -> None:
        self._stream = Stream(stream)
        self._bars: RichProgress | None = None
        self._stage, self._total, self._done = "", 0, 0
        self._started = self._last_line = 0.0
        self._json = logs.asked_for() == "json"
        if self._stream.isatty() and not self._json:
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bars = RichProgress(*columns, console=Console(file=cast(TextIO, self._stream)))

    @classmethod
    def to_stderr(cls) -> Progress:
        logs.set_up(logs.asked_for())
        return cls(stderr())

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, message: str) -> None:
        """One line about something that happened."""
        if self._json:
            logs.log("note", message=message)
        elif self._bars is not None:
            self._bars.console.print(message, highlight=False, markup=False)
        else:
            self._stream.write(f"{message}\n")
            self._stream.flush()

    def start(self, stage: str, total: int) -> None:
        """A stage of `total` items begins."""
        self._stage, self._total, self._done = stage, total, 0
        self._started = time.monotonic()
        self._last_line = self._started
        if self._bars is not None:
            self._task = self._bars.add_task(stage, total=total)

    def advance(self) -> None:
        """One more item of the stage is done."""
        self._done += 1
        if self._bars is not None:
            self._bars.advance(self._task)
            return
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        elapsed = now - self._started
        left = elapsed / self._done * (self._total - self._done)
        if self._json:
            stage, done, total = self._stage, self._done, self._total
            logs.log("progress", stage=stage, done=done, total=total, seconds_left=round(left, 1))
            return
        self.note(
            f"{self._stage}: {self._done}/{self._total}, {elapsed:.0f} s elapsed, about {left:.0f} s left"
        )


class StageLog:
    """Shows the stages of a run, and records them for the manifest."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.stages: list[Stage] = []

    def note(self, message: str) -> None:
        """One line about something that happened."""
        self._progress.note(message)

    def collect(self, name: str, key: str, total: int, answers: Iterator[tuple[int, Result]]) -> list[Result]:
        """All results of a stage, in the order of its items."""
        results: dict[int, Result] = {}
        started = time.monotonic()
        self._progress.start(name, total)
        for index, result in answers:
            results[index] = result
            self._progress.advance()
        num_reused = sum(result.reused for result in results.values())
        self._remember(name, key, total, num_reused, started)
        return [results[index] for index in range(total)]

    @contextmanager
    def stage(self, name: str, key: str, *, num_items: int) -> Iterator[None]:
        """A stage that is one task."""
        started = time.monotonic()
        self._progress.start(name, num_items)
        yield
        for _ in range(num_items):
            self._progress.advance()
        self._remember(name, key, num_items, 0, started)

    def _remember(self, name: str, key: str, num_items: int, num_reused: int, started: float) -> None:
        wall_s = round(time.monotonic() - started, 3)
        stage = Stage(name=name, key=key, num_items=num_items, num_reused=num_reused, wall_s=wall_s)
        self.stages.append(stage)
        logs.log("stage done", stage=name, num_items=num_items, num_reused=num_reused, seconds=wall_s)


# Progress of a transfer: a bar on a terminal, an occasional plain line in a log. Always on stderr.


@contextmanager
def bytes_to_stderr(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the bytes done and the total."""
    if not sys.stderr.isatty():
        yield _lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(name: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_EVERY_S:
            last = now
            streams.note(f"{name}: {done:,} of {total:,} bytes")

    return show
