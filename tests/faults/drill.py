"""Kills, one after another, at every stage of real runs on a real cluster of several nodes.

`python -m tests.faults.drill --kills 60 --seed 0 --folder DIR` starts a cluster of a head without CPUs and
two nodes of one CPU, and runs one small job again and again. In each run it kills once in every stage,
with SIGKILL and at a moment drawn from the seed: a worker's process, a node's raylet or the driver, which
is then started again. Every run has to end with the bytes of an undisturbed one, and no shard or layer
whose worker said that it was finished may be computed again. With `--side-by-side` two drivers carry out
one run at the same time.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ffsplit
from ffsplit.store.gc import collect, plan
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from tests.faults.drivers import Drivers
from tests.faults.events import Event, Events, recomputed
from tests.faults.nodes import Nodes
from tests.small_jobs import HEALED_SHARDS, SmallJob, committed_digests
from tests.tiny_models import save_checkpoint

STAGES = ("calibrate", "reduce", "compress", "heal", "measure", "publish")
TARGETS = ("worker", "raylet", "driver")
STARTS = {"measure": "taken", "publish": "publishing"}
"""The line that says a stage's item is in hand, where it is not `started`."""
LONGEST_PAUSE_S = {"heal": 1.0, "measure": 0.3}
"""Those whose items take a while are killed in the midst of one."""


class Kill(NamedTuple):
    """Whom to kill, so long after the n-th item of a stage has been taken in hand."""

    stage: str
    target: str
    nth: int
    pause_s: float


def planned(num_kills: int, *, seed: int) -> list[list[Kill]]:
    """A kill a stage in each run; three runs kill everybody at every stage. Nobody works at publishing."""
    generator = random.Random(seed)
    runs: list[list[Kill]] = []
    for number in range(num_kills):
        run, place = divmod(number, len(STAGES))
        stage = STAGES[place]
        target = TARGETS[(run + place) % len(TARGETS)]
        if stage == "publish" and target == "worker":
            target = "driver"
        nth = generator.randrange(3) if stage in ("calibrate", "compress") else 0
        runs += [] if place else [[]]
        runs[-1].append(Kill(stage, target, nth, generator.uniform(0, LONGEST_PAUSE_S.get(stage, 0.03))))
    return runs


@dataclass
class Killer:
    """Carries out a run's kills, one after another, as the log lines of the run say where it is."""

    events: Events
    nodes: Nodes
    kills: Sequence[Kill]
    driver: int = 0
    done: list[Kill] = field(default_factory=list)
    problem: str = ""
    _missed: Event | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._over = threading.Event()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        try:
            while len(self.done) < len(self.kills) and not self._over.is_set():
                event = self._awaited(self.kills[len(self.done)])
                if event is not None:
                    self._carry_out(self.kills[len(self.done)], event)
                time.sleep(0.01)
        except Exception as error:
            self.problem = f"the killer: {type(error).__name__}: {error}"

    def _awaited(self, kill: Kill) -> Event | None:
        """The newest line of the stage that the next kill is for, once its n-th item is in hand."""
        name = STARTS.get(kill.stage, "started")
        found = [
            event
            for event in self.events.read()
            if event.name == name and (kill.stage == "publish" or event.stage == kill.stage)
        ]
        return found[-1] if len(found) > kill.nth and found[-1] != self._missed else None

    def _carry_out(self, kill: Kill, event: Event) -> None:
        time.sleep(kill.pause_s)
        worker = None if kill.stage == "publish" else event.pid
        pids = {"worker": worker, "driver": self.driver, "raylet": self.nodes.raylet_of(worker)}
        pid = pids[kill.target]
        assert pid
        self.done.append(kill)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended by itself in that moment: the next item will do
            self.done.pop()
            self._missed = event


def run_with_kills(killer: Killer, log: Path, drivers: Drivers, config: ffsplit.JobConfig) -> str:
    """One run; whenever its driver is killed another one follows. Returns what went wrong."""
    with killer.at_work():
        while True:
            child = drivers.start(config, log)
            killer.driver = child.pid
            code = drivers.end_of(child, meanwhile=killer.nodes.replace_dead)
            if code == 0:
                break
            if code != -signal.SIGKILL or killer.done[-1].target != "driver":
                return f"the driver ended with {code}: {log.read_text()[-2000:]}"
    if killer.problem:
        return killer.problem
    if len(killer.done) < len(killer.kills):
        return f"{killer.kills[len(killer.done)].stage} went by, and nothing was killed"
    again = recomputed(killer.events.read())
    return f"computed again: {', '.join(again)}" if again else ""


def run_twice_at_once(logs: Sequence[Path], drivers: Drivers, config: ffsplit.JobConfig) -> str:
    """Two drivers of one run, side by side. Returns what went wrong."""
    both = [drivers.start(config, log) for log in logs]
    codes = [drivers.end_of(child, meanwhile=lambda: None) for child in both]
    if codes != [0, 0]:
        return f"the drivers ended with {codes}: {[log.read_text()[-2000:] for log in logs]}"
    attempts = list(Path(config.out).glob("*/*/manifest.json"))
    return "" if len(attempts) == 1 else f"{len(attempts)} attempts were left"


def judge(out: Path, expected: dict[str, str], *, said: str) -> str:
    """What is wrong with what a run has left, "" when nothing is.

    A driver that was killed after its commit leaves its scratch to `gc`: the next one has nothing to do.
    """
    if committed_digests(out) != expected:
        return "other bytes than the undisturbed run's"
    if not verify(str(out)).ok:
        return "the artifact is not whole"
    if (out / ".scratch").exists() and "is committed already" in said:
        for owner in out.glob(".scratch/*/owners/*"):
            os.utime(owner, (0, 0))
        store = open_store(str(out))
        collect(store, plan(store, keep_last=1, min_age=timedelta(0)))
    return "the scratch was left behind" if (out / ".scratch").exists() else ""


def said_by(logs: Sequence[Path]) -> str:
    """What the drivers of a run printed."""
    return "".join(log.read_text() for log in logs)


def drill(num_kills: int, *, seed: int, folder: Path, side_by_side: bool = False) -> int:
    """Carry out the drill; returns how many runs went wrong."""
    job = SmallJob(folder, save_checkpoint(folder / "model", "bert"))
    settings: dict[str, Any] = {"recipe": job.recipe(**HEALED_SHARDS), "healing_threads": 1}
    ffsplit.compress(job.config(folder / "undisturbed", **settings))
    expected = committed_digests(folder / "undisturbed")
    drivers, nodes, wrong = Drivers.ready(), Nodes.start(), 0
    settings |= {"runner": "ray", "address": nodes.cluster.address}

    def carry_out(name: str, run: Callable[[ffsplit.JobConfig], str], logs: Sequence[Path]) -> None:
        nonlocal wrong
        started, out = time.monotonic(), folder / name
        try:
            problem = run(job.config(out, **settings)) or judge(out, expected, said=said_by(logs))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        wrong += bool(problem)
        print(f"{name}: {time.monotonic() - started:.1f} s, {problem or 'ok'}", flush=True)
        nodes.replace_dead()

    for number, kills in enumerate(planned(num_kills, seed=seed), start=1):
        log = folder / f"drivers-{number}.err"
        killer = Killer(Events(nodes.logs, (log,)), nodes, kills)
        carry_out(f"run-{number}", partial(run_with_kills, killer, log, drivers), [log])
        print("  killed", ", ".join(f"{kill.stage} {kill.target}" for kill in killer.done), flush=True)
    if side_by_side:
        logs = [folder / f"side-by-side-{number}.err" for number in (1, 2)]
        carry_out("side-by-side", partial(run_twice_at_once, logs, drivers), logs)
    nodes.cluster.shutdown()
    print(f"{num_kills} kills, {wrong} runs went wrong")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--side-by-side", action="store_true", help="two drivers of one run besides")
    asked = parser.parse_args()
    wrong = drill(asked.kills, seed=asked.seed, folder=asked.folder, side_by_side=asked.side_by_side)
    raise SystemExit(1 if wrong else 0)
