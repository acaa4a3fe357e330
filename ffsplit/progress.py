"""Progress of a run, stage by stage: bars on a terminal or in a notebook, plain lines in a log.

Bars on a terminal and lines go to stderr.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from ffsplit import logs, streams
from ffsplit.notebook_bars import NotebookBars, is_in_notebook
from ffsplit.store.beacon import Beacon, Position
from ffsplit.store.manifest import Stage
from ffsplit.store.scratch import Result
from ffsplit.streams import Stream, stderr

LINE_EVERY_S = 10.0
SILENT_S = 30.0
"""A log has a line at least this often."""
LOOK_EVERY_S = 5.0
"""Seconds between two looks at how far a task of one item is."""
BEAT_S = 1.0
SETTLED_S = 30.0
"""Estimates far below this are mostly overhead: what such stages took scales later estimates little."""


class Expected(NamedTuple):
    """A stage that a run will probably have, and its estimated seconds; None if not known."""

    stage: str
    seconds: float | None


class _Count(MofNCompleteColumn):
    """How many items are done; nothing for work without parts."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class _Times(ProgressColumn):
    """The time that is left, or that a finished stage took."""

    def render(self, task: Task) -> Text:
        elapsed = _clock(task.finished_time or task.elapsed or 0.0)
        left = "" if task.finished or task.total is None else task.fields.get("left", "")
        return Text(f"{elapsed}{left}")


class Progress:
    """Shows the user what a job is doing. Use as a context manager."""

    def __init__(self, stream: TextIO | Stream | None, *, in_notebook: bool = False) -> None:
        self._stream = Stream(stream)
        self._bars: RichProgress | None = None
        self._stage, self._total, self._done = "", 0, 0
        self._amount, self._unit = 0, ""
        self._expected: Sequence[Expected] = ()
        self._number, self._is_planned = 0, False
        self._spent = self._estimated = 0.0
        self._started = self._last_line = self._looked = 0.0
        self._beacon: Beacon | None = None
        self._position: Position | None = None
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._json = logs.asked_for() == "json"
        if (in_notebook or self._stream.isatty()) and not self._json:
            columns = (
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description:<12}", markup=False),
                BarColumn(bar_width=None, table_column=Column(min_width=4, max_width=24)),
                _Count(table_column=Column(no_wrap=True)),
                _Times(table_column=Column(no_wrap=True)),
            )
            console = Console(file=cast(TextIO, self._stream))
            self._bars = NotebookBars(*columns) if in_notebook else RichProgress(*columns, console=console)

    @classmethod
    def to_user(cls) -> Progress:
        """On stderr, or as an output of the notebook's cell."""
        logs.set_up(logs.asked_for())
        return cls(stderr(), in_notebook=is_in_notebook())

    def __enter__(self) -> Progress:
        self._ended.clear()
        self._beats = threading.Thread(target=self._beat, name="ffsplit-progress", daemon=True)
        try:
            if self._bars is not None:
                self._bars.start()
            self._beats.start()
        except BaseException:  # an interrupt: nothing may go on drawing in an interactive session
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        try:
            if self._beats.is_alive():
                self._beats.join()
        finally:
            if self._bars is not None:
                self._bars.stop()

    def note(self, message: str) -> None:
        """One line about something that happened."""
        with self._lock:
            if self._json:
                logs.log("note", message=message)
            elif self._bars is not None:
                self._bars.console.print(message, highlight=False, markup=False)
            else:
                self._stream.write(f"{message}\n")
                self._stream.flush()

    def expect(self, stages: Sequence[Expected]) -> None:
        """The stages of a run, in their order. Some may be left out, and others may come between them."""
        with self._lock:
            self._expected, self._number, self._spent, self._estimated = tuple(stages), 0, 0.0, 0.0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Something without parts, such as reading a model: a spinner on a terminal."""
        self.start(what, None)
        try:
            yield
        finally:
            with self._lock:
                self._total = 0
                if self._bars is not None:
                    self._bars.remove_task(self._task)

    def start(self, stage: str, total: int | None, *, beacon: Beacon | None = None) -> None:
        """A stage of `total` items begins; None for work without parts. A `beacon` tells how far it is."""
        with self._lock:
            self._count_stage(stage)
            self._stage, self._total, self._done = stage, 1 if total is None else total, 0
            self._amount, self._unit = 0, ""
            self._beacon, self._position = beacon, None
            self._started = self._last_line = self._looked = time.monotonic()
            if self._bars is not None:
                self._task = self._bars.add_task(self._title(), total=total)

    def _count_stage(self, stage: str) -> None:
        """Find the stage among those that are expected, and remember what the last one took."""
        if self._number and self._is_planned:
            self._spent += time.monotonic() - self._started
            self._estimated += self._expected[self._number - 1].seconds or 0.0
        names = [each.stage for each in self._expected[self._number :]]
        self._is_planned = stage in names
        if self._is_planned:
            self._number += names.index(stage) + 1

    def _title(self, doing: str = "") -> str:
        number = f"{self._number}/{len(self._expected)} " if self._number else ""
        return f"{number}{self._stage}{f': {doing}' if doing else ''}"

    def advance(self, amount: int = 0, unit: str = "") -> None:
        """One more item of the stage is done, in which this much was computed, such as 4,000 tokens."""
        with self._lock:
            self._done += 1
            self._amount, self._unit = self._amount + amount, unit
            self._beacon = self._position = None
            if self._bars is not None:
                self._move_bar()
            elif self._done == self._total or time.monotonic() - self._last_line >= LINE_EVERY_S:
                self._write_line()

    def _beat(self) -> None:
        """Look how far a task is, and break a long silence. Runs in a thread of its own."""
        while not self._ended.wait(BEAT_S):
            beacon, now = self._beacon, time.monotonic()
            if beacon is not None and now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                found = beacon.read()  # may take long, so nobody waits for it
                with self._lock:
                    if self._beacon is beacon and found is not None and found != self._position:
                        self._show(found)
            with self._lock:
                if self._bars is not None and self._done < self._total:
                    self._bars.update(self._task, left=self._left_in_words())
                elif self._done < self._total and now - self._last_line >= SILENT_S:
                    self._write_line()
            if self._bars is not None:
                self._bars.refresh()

    def _show(self, position: Position) -> None:
        self._position = position
        if self._bars is not None:
            self._move_bar()
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._write_line()

    def _move_bar(self) -> None:
        """Tell the bars where the stage is. Threads that draw them never wait for this lock."""
        assert self._bars is not None
        at, left = self._at(), self._left_in_words()
        title = self._title(at.doing)
        self._bars.update(self._task, description=title, total=at.total, completed=at.done, left=left)

    def _at(self) -> Position:
        return self._position or Position(done=self._done, total=self._total, doing="")

    def _seconds_left(self) -> tuple[float | None, float | None]:
        """Of this stage, and of all. None where there is nothing yet to tell it by.

        The estimates of later stages are scaled by what earlier ones took of theirs.
        """
        at, elapsed = self._at(), time.monotonic() - self._started
        left = elapsed / at.done * (at.total - at.done) if at.done else None
        ahead = [each.seconds for each in self._expected[self._number :]]
        own = self._expected[self._number - 1].seconds if self._number and self._is_planned else None
        if left is None or not self._number or own is None or None in ahead:
            return left, None
        spent, estimated = self._spent + elapsed + left, self._estimated + own
        later = sum(seconds for seconds in ahead if seconds is not None)
        return left, left + later * (spent + SETTLED_S) / (estimated + SETTLED_S)

    def _left_in_words(self) -> str:
        """For a bar: the time left of the stage and of all."""
        left, in_all = self._seconds_left()
        parts = [f"{_clock(left)} left"] if left is not None else []
        parts += [f"{_clock(in_all)} in all"] if in_all is not None else []
        return "".join(f", {part}" for part in (*parts, *self._rate()))

    def _rate(self) -> list[str]:
        """What is computed per second, such as `1,650 tokens/s`, or nothing."""
        elapsed = time.monotonic() - self._started
        if not self._amount or elapsed < BEAT_S:
            return []
        rate = self._amount / elapsed
        return [f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"]

    def _write_line(self) -> None:
        now = time.monotonic()
        self._last_line = now
        elapsed, at = now - self._started, self._at()
        left, in_all = self._seconds_left()
        if self._json:
            seconds = {"seconds_left": left, "seconds_left_in_all": in_all}
            more: dict[str, logs.Field] = {
                name: None if value is None else round(value, 1) for name, value in seconds.items()
            }
            if self._number:
                more |= {"number": self._number, "num_stages": len(self._expected)}
            with logs.fields(stage=self._stage, **more, **({"doing": at.doing} if at.doing else {})):
                logs.log("progress", done=at.done, total=at.total)
            return
        parts = [at.doing] if at.doing else []
        parts += [f"{at.done}/{at.total}", f"{elapsed:.0f} s elapsed"]
        parts += [] if left is None else [f"about {left:.0f} s left"]
        parts += [] if in_all is None else [f"{in_all:.0f} s in all"]
        parts += self._rate()
        of_all = f"stage {self._number} of {len(self._expected)}, " if self._number else ""
        self.note(f"{of_all}{self._stage}: {', '.join(parts)}")


def _clock(seconds: float) -> str:
    """Seconds as 0:07, 4:12 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Share(NamedTuple):
    """What one worker reserves, and how many can run at once at the moment."""

    cpus: float
    gpus: float
    num_workers: Callable[[], int]


class StageLog:
    """Shows the stages of a run, and records them for the manifest.

    A stage reserves a share per worker while it runs, for as many workers as it has items.
    """

    def __init__(self, progress: Progress, share: Share) -> None:
        self._progress, self._share = progress, share
        self.stages: list[Stage] = []

    def note(self, message: str) -> None:
        """One line about something that happened."""
        self._progress.note(message)

    def expect(self, stages: Sequence[Expected]) -> None:
        """The stages of the run, in their order."""
        self._progress.expect(stages)

    def collect(
        self, name: str, key: str, total: int, answers: Iterator[tuple[int, Result]], *, unit: str = "items"
    ) -> list[Result]:
        """All results of a stage, in the order of its items, which are of this `unit`."""
        results: dict[int, Result] = {}
        started, workers = time.monotonic(), self._share.num_workers()
        self._progress.start(name, total)
        for index, result in answers:
            results[index] = result
            tokens = result.facts.get("num_tokens")
            amount, counted = (1, unit) if tokens is None else (int(str(tokens)), "tokens")
            self._progress.advance(0 if result.reused else amount, counted)
        num_reused = sum(result.reused for result in results.values())
        at_once = min(total, max(workers, self._share.num_workers()))  # a cluster may have grown
        reserved = (at_once * self._share.cpus, at_once * self._share.gpus)
        self._remember(name, key, total, num_reused, started, reserved)
        return [results[index] for index in range(total)]

    @contextmanager
    def stage(
        self,
        name: str,
        key: str,
        *,
        num_items: int,
        beacon: Beacon | None = None,
        workers: int = 1,
        threads: int | None = None,
    ) -> Iterator[None]:
        """A stage that is one task, in one or several processes. A `beacon` tells how far it is."""
        started = time.monotonic()
        self._progress.start(name, num_items, beacon=beacon)
        yield
        for _ in range(num_items):
            self._progress.advance()
        reserved = (workers * (threads or self._share.cpus), workers * self._share.gpus)
        self._remember(name, key, num_items, 0, started, reserved)

    def _remember(
        self,
        name: str,
        key: str,
        num_items: int,
        num_reused: int,
        started: float,
        reserved: tuple[float, float],
    ) -> None:
        wall_s = round(time.monotonic() - started, 3)
        cpu_s, gpu_s = (round(wall_s * number, 3) for number in reserved)
        stage = Stage(
            name=name,
            key=key,
            num_items=num_items,
            num_reused=num_reused,
            wall_s=wall_s,
            cpu_s=cpu_s,
            gpu_s=gpu_s,
        )
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
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(name, total=None)

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        bar.start()  # with the first bytes, not before what may go wrong earlier

    try:
        yield show
    finally:
        bar.stop()


def _lines(name: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_EVERY_S:
            last = now
            streams.note(f"{name}: {done:,} of {total:,} bytes")

    return show
