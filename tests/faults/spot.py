"""A batch of small models on nodes that are taken away at random all through it, as spot nodes are.

`python -m tests.faults.spot --models 20 --seed 0 --folder DIR` starts a cluster of a head without CPUs and
three nodes of one CPU, and compresses the models of a zoo file on it. Again and again, after a time drawn
from the seed, a node is killed with all that runs on it, and another one joins a moment later. Every model
has to be published and whole, and nothing whose worker said that it was finished may be computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ffsplit.store.pull import verify
from tests.faults.events import Events, recomputed
from tests.faults.nodes import Nodes
from tests.small_jobs import HEALED_SHARDS, SmallJob
from tests.tiny_models import save_checkpoint

FAMILIES = ("bert", "llama", "opt")
NUM_NODES = 3
BETWEEN_S = (10.0, 30.0)
"""From one loss of a node to the next."""
ABSENT_S = 2.0


def write_zoo(folder: Path, num_models: int) -> Path:
    """Models that differ in their weights, each healed, so that every stage is met."""
    families = zip(range(num_models), FAMILIES * num_models, strict=False)
    models = [
        {"name": f"model-{index:02d}", "model": str(save_checkpoint(folder / f"{index}", family, seed=index))}
        for index, family in families
    ]
    job = SmallJob(folder, Path(models[0]["model"]))
    defaults = {"recipe": job.recipe(**HEALED_SHARDS), "calibration": str(job.text), "keep": 0.5}
    defaults |= {"samples": 40, "max_length": 16, "healing_threads": 1}
    zoo: dict[str, Any] = {"destination": str(folder / "out"), "backoff_s": 1, "max_models_in_flight": 3}
    path = folder / "zoo.yaml"
    path.write_text(yaml.safe_dump(zoo | {"defaults": defaults, "models": models}), "utf-8")
    return path


def batch(zoo: Path, nodes: Nodes, log: Path, generator: random.Random) -> tuple[int, dict[str, Any], int]:
    """Run the batch and take nodes away meanwhile. Returns its exit code, its document, and how many.

    Ray adds nodes in the main thread alone, so the batch is the one that is in the background.
    """
    command = [sys.executable, "-m", "ffsplit.cli", "zoo", str(zoo), "--json"]
    command += ["--address", nodes.cluster.address]
    printed, num_taken = log.with_suffix(".json"), 0
    environment = os.environ | {"FFSPLIT_LOG": "json"}
    with (
        log.open("w") as error,
        printed.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=error, env=environment) as process,
    ):
        while not _ends_within(process, generator.uniform(*BETWEEN_S)):
            nodes.take_away(generator)
            num_taken += 1
            time.sleep(ABSENT_S)
            nodes.replace_dead()
    return process.returncode, json.loads(printed.read_text() or "{}"), num_taken


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def drill(num_models: int, *, seed: int, folder: Path) -> list[str]:
    """Carry out the drill. Returns what went wrong."""
    zoo, log = write_zoo(folder, num_models), folder / "batch.err"
    nodes = Nodes.start(NUM_NODES)
    events, started = Events(nodes.logs, (log,)), time.monotonic()
    code, document, num_taken = batch(zoo, nodes, log, random.Random(seed))
    seconds = time.monotonic() - started
    read = events.read()
    nodes.cluster.shutdown()
    problems = [f"exit code {code}: {log.read_text()[-1000:]}"] if code else []
    problems += [f"{item} was computed again" for item in recomputed(read)]
    for index in range(num_models):
        out = folder / "out" / f"model-{index:02d}"
        if not list(out.glob("*/commit.json")) or not verify(str(out)).ok:
            problems.append(f"{out.name} was not published whole")
    begun, ended = (sum(event.name == name for event in read) for name in ("started", "finished"))
    again = sum(each["num_attempts"] > 1 for each in document.get("models", ()))
    print(
        f"{num_models} models in {seconds:.0f} s, {num_taken} nodes taken away, {ended} items "
        f"finished, {begun - ended} begun in vain, {again} models tried again, {len(problems)} problems"
    )
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    found = drill(asked.models, seed=asked.seed, folder=asked.folder)
    print(*found, sep="\n")
    raise SystemExit(1 if found else 0)
