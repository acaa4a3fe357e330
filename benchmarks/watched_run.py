"""A run of ffsplit in a process of its own, and the memory of every process it starts, stage by stage.

Memory is read from /proc: anonymous pages are what has to be in memory; file-backed ones are what the
kernel keeps there as long as there is room.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from ffsplit.config import JobConfig, Record
from ffsplit.progress import Progress

SAMPLE_EVERY_S = 0.25
DEATH_S = 30
"""How long a killed driver's Ray may take to end by itself."""


class Peak(Record):
    """The most that one process of a role held during one stage, in bytes."""

    anonymous: int = 0
    file_backed: int = 0


class StageUse(Record):
    """One stage: its seconds, the peaks of a process by role, and of all processes' anonymous memory."""

    name: str
    seconds: float
    peaks: dict[str, Peak]
    anonymous_together: int


class WatchedRun(Record):
    """One start of the driver, its stages in order, and what the machine did for others meanwhile."""

    stages: tuple[StageUse, ...]
    killed: bool
    cpu_share_of_others: float

    @property
    def largest(self) -> int:
        """The largest anonymous memory of any process, in bytes."""
        return max(peak.anonymous for stage in self.stages for peak in stage.peaks.values())

    @property
    def largest_together(self) -> int:
        return max(stage.anonymous_together for stage in self.stages)


class Event(NamedTuple):
    """A stage begins (`num_done` is 0) or has come further."""

    stage: str
    num_done: int
    total: int

    @property
    def following(self) -> str:
        return f"after {self.stage}" if self.num_done == self.total else self.stage


class ToldProgress(Progress):
    """Progress that also says on stdout, a line each, what `watch` reads there."""

    def start(self, stage: str, total: int | None, **more: Any) -> None:
        super().start(stage, total, **more)
        self._tell()

    def advance(self, *amount: Any) -> None:
        super().advance(*amount)
        self._tell()

    def _tell(self) -> None:
        print(self._stage, self._done, self._total, flush=True)


def drive(config: JobConfig) -> None:
    """What the watched process does."""
    import ffsplit

    ffsplit.compress(config, progress=ToldProgress.to_user())


def watch(
    command: Sequence[str], *, environment: dict[str, str], kill_when: Callable[[Event], bool]
) -> WatchedRun:
    """Run a driver and watch it and everything it starts; SIGKILL it when it comes to where it is to die."""
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert driver.stdout is not None
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    threading.Thread(target=_read_events, args=(driver.stdout, events), daemon=True).start()
    machine, stages, killed = _MachineUse(), [_Stage("prepare")], False
    while driver.poll() is None:
        stages[-1].sample(machine.relatives(driver.pid))
        while not events.empty() and not killed:
            event = events.get()
            if event.following != stages[-1].name:
                stages[-1].end()
                stages.append(_Stage(event.following))
            if kill_when(event):
                driver.send_signal(signal.SIGKILL)
                killed = True
        time.sleep(SAMPLE_EVERY_S)
    stages[-1].end()
    if not killed and driver.returncode != 0:
        raise SystemExit(f"the run failed with exit code {driver.returncode}")
    share = machine.share_of_others()
    machine.end_what_is_left()
    used = tuple(stage.used() for stage in stages)
    return WatchedRun(stages=used, killed=killed, cpu_share_of_others=share)


def _read_events(lines: IO[str], events: queue.SimpleQueue[Event]) -> None:
    for line in lines:
        stage, num_done, total = line.split()
        events.put(Event(stage, int(num_done), int(total)))


class _Stage:
    """What is seen of a stage while it lasts."""

    def __init__(self, name: str) -> None:
        self.name, self._started, self._seconds = name, time.monotonic(), 0.0
        self._peaks: dict[str, Peak] = {}
        self._together = 0

    def sample(self, processes: Iterator[tuple[int, str]]) -> None:
        together = 0
        for pid, role in processes:
            anonymous, file_backed = resident_bytes(pid)
            together += anonymous
            peak = self._peaks.get(role, Peak())
            self._peaks[role] = Peak(
                anonymous=max(peak.anonymous, anonymous), file_backed=max(peak.file_backed, file_backed)
            )
        self._together = max(self._together, together)

    def end(self) -> None:
        self._seconds = time.monotonic() - self._started

    def used(self) -> StageUse:
        return StageUse(
            name=self.name, seconds=self._seconds, peaks=self._peaks, anonymous_together=self._together
        )


class _MachineUse:
    """The processes of a run, and their share of what the machine's cores did."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[psutil.Process, float]] = {}
        self._busy, self._started = _busy_seconds(), time.monotonic()

    def relatives(self, driver: int) -> Iterator[tuple[int, str]]:
        """The driver and its descendants, each with its role."""
        try:
            family = [psutil.Process(driver)]
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in family:
            with suppress(psutil.NoSuchProcess):  # a short one, that has ended meanwhile
                times = process.cpu_times()
                self._seen[process.pid] = process, times.user + times.system
                is_worker = " ".join(process.cmdline()[:1]).startswith("ray::")
                yield process.pid, "driver" if process.pid == driver else "worker" if is_worker else "Ray"

    def share_of_others(self) -> float:
        """Of all cores' time since the start."""
        own = sum(seconds for _, seconds in self._seen.values())
        cores = (psutil.cpu_count() or 1) * (time.monotonic() - self._started)
        return max(0.0, (_busy_seconds() - self._busy - own) / cores)

    def end_what_is_left(self) -> None:
        _, alive = psutil.wait_procs([process for process, _ in self._seen.values()], timeout=DEATH_S)
        for process in alive:
            process.kill()


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def resident_bytes(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of a process; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    anonymous, file_backed = (int(found.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous * 1024, file_backed * 1024
