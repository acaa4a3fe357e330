"""Kills, one after another, at every stage of real runs on a real cluster of several nodes.

`python -m tests.faults.drill --kills 60 --seed 0 --folder DIR` starts a cluster of a head without CPUs and
two nodes of one CPU, and runs one small job again and again. In each run it kills, with SIGKILL and at a
moment drawn from the seed, a worker's process, a node's raylet or the driver; a driver that was killed is
started again. Every run has to end with the bytes of an undisturbed one, and no shard or layer whose
worker said that it was finished may be computed again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

import ffsplit
from ffsplit import logs
from ffsplit.artifacts.verify import verify
from tests.faults.events import Event, Events, recomputed
from tests.small_jobs import HEALED_SHARDS, SmallJob, committed_digests
from tests.tiny_models import save_checkpoint

CAUSES = [
    ("calibrate", "worker"),
    ("compress", "driver"),
    ("heal", "worker"),
    ("reduce", "raylet"),
    ("measure", "driver"),
    ("publish", "driver"),
    ("calibrate", "raylet"),
    ("compress", "worker"),
    ("reduce", "driver"),
    ("heal", "raylet"),
    ("measure", "worker"),
    ("publish", "raylet"),
    ("calibrate", "driver"),
    ("reduce", "worker"),
    ("compress", "raylet"),
    ("heal", "driver"),
    ("measure", "raylet"),
]
STARTS = {"measure": "taken", "publish": "publishing"}
"""The line that says a stage's item is in hand, where it is not `started`."""
QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
LONGEST_S = 600.0


@dataclass
class Nodes:
    """The cluster, whose dead nodes are replaced."""

    cluster: Cluster

    @classmethod
    def start(cls) -> Nodes:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000}
        nodes = cls(Cluster(initialize_head=True, head_node_args=head | {"_system_config": QUICK}))
        nodes.replace_dead()
        return nodes

    def replace_dead(self) -> None:
        for node in list(self.cluster.worker_nodes):
            if not any(process.poll() is None for process in self._raylets(node)):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000)

    def _raylets(self, node: Any) -> list[Any]:
        return [each.process for each in node.all_processes.get("raylet", [])]

    def raylet_of(self, pid: int | None) -> int:
        """The raylet that a worker belongs to, any node's when there is no worker."""
        raylets = [process.pid for node in self.cluster.worker_nodes for process in self._raylets(node)]
        parent = psutil.Process(pid).ppid() if pid is not None else raylets[0]
        return parent if parent in raylets else raylets[0]


@dataclass
class Killer:
    """Kills once, when the n-th item of a stage is in hand."""

    events: Events
    nodes: Nodes
    stage: str
    target: str
    nth: int
    pause_s: float
    driver: int | None = None
    killed: int | None = None

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
        while not self._over.is_set() and self.killed is None:
            wanted = STARTS.get(self.stage, "started")
            found = [
                event
                for event in self.events.read()
                if event.name == wanted and (self.stage == "publish" or event.stage == self.stage)
            ]
            if len(found) > self.nth or (found and self.stage not in ("calibrate", "compress")):
                self._kill(found[-1])
            time.sleep(0.01)

    def _kill(self, event: Event) -> None:
        time.sleep(self.pause_s)
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            worker = None if self.stage == "publish" else event.pid
            pid = {"worker": worker, "driver": self.driver}.get(self.target)
            pid = self.nodes.raylet_of(worker) if self.target == "raylet" else pid
            assert pid is not None
            self.killed = pid
            os.kill(pid, signal.SIGKILL)


def write_stderr_to(path: Path) -> None:
    """This process's log lines, and whatever else it says there."""
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)


def drive(config: ffsplit.JobConfig, address: str, log: str) -> None:
    """A driver in a process of its own, whose lines go to a file."""
    os.environ["RAY_ADDRESS"] = address
    write_stderr_to(Path(log))
    logs.ask_for("json")
    ffsplit.compress(config.model_copy(update={"address": address}))


def run_once(killer: Killer, config: ffsplit.JobConfig, log: Path, processes: Any) -> None:
    """One run with one kill; a driver that was killed is followed by another."""
    if killer.target == "driver":
        child = processes.Process(target=drive, args=(config, killer.nodes.cluster.address, str(log)))
        child.start()
        killer.driver = child.pid
        with killer.at_work():
            child.join(LONGEST_S)
        if child.exitcode is None:
            child.kill()
            raise TimeoutError(f"a driver that was not killed takes longer than {LONGEST_S:g} s")
        assert child.exitcode == (0 if killer.killed is None else -signal.SIGKILL), child.exitcode
    else:
        with killer.at_work():
            ffsplit.compress(config)
    ffsplit.compress(config)  # goes on after the driver's death, and has nothing to do otherwise


def drill(num_kills: int, *, seed: int, folder: Path, first: int = 1) -> int:
    """Run the drill, from the first-th kill of its seed on; returns how many runs went wrong."""
    job = SmallJob(folder, save_checkpoint(folder / "model", "bert"))
    settings: dict[str, Any] = {"recipe": job.recipe(**HEALED_SHARDS), "healing_threads": 1}
    ffsplit.compress(job.config(folder / "undisturbed", **settings))
    expected = committed_digests(folder / "undisturbed")
    processes = get_context("forkserver")
    processes.set_forkserver_preload(
        ["ffsplit.pipeline.run", "ffsplit.distributed.ray_runner", "tests.faults.drill"]
    )
    logs.ask_for("json")
    nodes, generator, wrong = Nodes.start(), random.Random(seed), 0
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
    session = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    for number in range(num_kills):
        nth, pause_s = generator.randrange(3), generator.uniform(0, 0.03)
        if number < first - 1:
            continue
        stage, target = CAUSES[number % len(CAUSES)]
        out, log = folder / f"run-{number}", folder / f"driver-{number}.err"
        events = Events(session, (log, folder / "drill.err"))
        killer = Killer(events, nodes, stage, target, nth, pause_s)
        started, problem = time.monotonic(), ""
        try:
            run_once(killer, job.config(out, runner="ray", **settings), log, processes)
            problem = judge(out, expected, events, killer)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        wrong += bool(problem)
        seconds = time.monotonic() - started
        print(f"{number + 1:3} {stage:<9} {target:<6} {seconds:5.1f} s  {problem or 'ok'}", flush=True)
        nodes.replace_dead()
    ray.shutdown()
    nodes.cluster.shutdown()
    print(f"{num_kills - first + 1} kills, {wrong} wrong")
    return wrong


def judge(out: Path, expected: dict[str, str], events: Events, killer: Killer) -> str:
    """What is wrong with a run that has ended, "" when nothing is."""
    if killer.killed is None:
        return "nothing was killed: the stage went by unseen"
    if committed_digests(out) != expected:
        return "other bytes than the undisturbed run's"
    if not verify(str(out)).ok:
        return "the artifact is not whole"
    if (out / ".scratch").exists():
        return "the scratch was left behind"
    again = recomputed(events.read())
    return f"computed again: {', '.join(again)}" if again else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--first", type=int, default=1, help="leave out the kills before this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    raise SystemExit(1 if drill(asked.kills, seed=asked.seed, folder=asked.folder, first=asked.first) else 0)
