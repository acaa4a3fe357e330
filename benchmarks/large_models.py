"""Compress a model larger than a worker, killed half way and resumed, into benchmarks/large_models.md.

    python -m benchmarks.large_models FOLDER                     about 40 GB free there; half an hour
    python -m benchmarks.large_models FOLDER --part commands     a minute, on a machine that does nothing else

The first writes a checkpoint of Llama-7B's shape with random bf16 weights, shard by shard; takes 48
sequences of 128 tokens through calibration, pruning with bias compensation, assembly and fidelity, block by
block; kills the driver with SIGKILL when half of the calibration is done, and runs the same again. The
memory of every process is read from /proc four times a second. Fails where a process went over --limit.

The second times `ffsplit inspect` and the pre-flight on a checkpoint of a 70 billion parameters' shape.
What each part found stands in FOLDER/found, from which the page is written; the rest of what was written
is removed at the end, unless --keep-files is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.large_checkpoint import write_checkpoint
from benchmarks.large_models_page import Outcome, TimedCommand, page
from benchmarks.watched_run import Event, drive, watch

HERE = Path(__file__).parent
RECIPE = """\
name: large
description: The neurons whose output varies most, the rest replaced by its mean as a bias.
score: centred
heavy_share: 1
steps: [{kind: prune, compensation: bias}]
calibration: {shard_size: 8, batch_tokens: 1024, sampled_tokens: 256, held_out: 4}
measurement: {peak_memory: false}
"""
MAX_LENGTH, KEEP = 128, 0.5
GB = 1e9
REPEATS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=("run", "commands", "page"), default="run")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial")
    parser.add_argument("--rows", type=int, default=48, help="sequences; fewer for a trial")
    parser.add_argument("--memory", default="6GB", help="what the run is told that a worker may use")
    parser.add_argument("--limit", type=float, default=6.0, help="GB of anonymous memory a process may hold")
    parser.add_argument("--out", type=Path, default=HERE / "large_models.md")
    parser.add_argument("--keep-files", action="store_true")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    folder: Path = parsed.folder.resolve()
    if parsed.drive:
        drive_run(folder, num_rows=parsed.rows, memory=parsed.memory)
        return 0
    found = folder / "found"
    found.mkdir(parents=True, exist_ok=True)
    try:
        if parsed.part == "run":
            outcome = run(folder, num_layers=parsed.layers, num_rows=parsed.rows, memory=parsed.memory)
            (found / "run.json").write_text(outcome.model_dump_json(indent=2))
        elif parsed.part == "commands":
            timed = [each.model_dump() for each in time_commands(folder)]
            (found / "commands.json").write_text(json.dumps(timed, indent=2))
    finally:
        if not parsed.keep_files:
            for name in ("model", "shape", "out", "tmp"):
                shutil.rmtree(folder / name, ignore_errors=True)
    outcome = Outcome.model_validate_json((found / "run.json").read_text())
    commands = found / "commands.json"
    timed = json.loads(commands.read_text()) if commands.exists() else []
    parsed.out.write_text(page(outcome, [TimedCommand.model_validate(each) for each in timed]))
    return 0 if outcome.largest < parsed.limit * GB else 1


def run(folder: Path, *, num_layers: int, num_rows: int, memory: str) -> Outcome:
    """The checkpoint, a run of it that is killed, and one that takes it up."""
    import ffsplit
    from ffsplit.store.pull import verify

    started = time.monotonic()
    write_checkpoint(folder / "model", num_layers=num_layers)
    written_s = time.monotonic() - started
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(HERE.parent)}
    settings = ["--rows", str(num_rows), "--memory", memory]
    command = [sys.executable, "-m", "benchmarks.large_models", str(folder), *settings, "--drive"]

    def half_way(event: Event) -> bool:
        return event.stage == "calibrate" and 2 * event.num_done >= event.total

    def never(event: Event) -> bool:
        return False

    runs = tuple(watch(command, environment=environment, kill_when=when) for when in (half_way, never))
    (path,) = (folder / "out").glob("*/*/manifest.json")
    return Outcome(
        runs=runs,
        num_layers=num_layers,
        num_rows=num_rows,
        max_length=MAX_LENGTH,
        keep=KEEP,
        memory=memory,
        written_s=written_s,
        is_whole=verify(str(folder / "out")).ok,
        manifest=ffsplit.Manifest.from_json(path.read_text()),
    )


def drive_run(folder: Path, *, num_rows: int, memory: str) -> None:
    """One start of the run, in the process that is watched."""
    import ffsplit
    from ffsplit.config import parse_size

    drive(
        ffsplit.JobConfig(
            model=str(folder / "model"),
            out=str(folder / "out"),
            recipe=str(folder / "recipe.yaml"),
            keep=KEEP,
            samples=num_rows,
            max_length=MAX_LENGTH,
            dtype="bfloat16",
            memory_per_worker=parse_size(memory, name="--memory"),
        )
    )


def time_commands(folder: Path) -> list[TimedCommand]:
    """Wall and CPU time of the commands that look before anything starts, Python's own start included."""
    from tests.shaped_checkpoints import LLAMA_70B, save_llama_shape

    shutil.rmtree(folder / "shape", ignore_errors=True)
    model = save_llama_shape(folder / "shape", **LLAMA_70B)
    flags = ["--out", str(folder / "out"), "--recipe", "flap", "--dtype", "bfloat16", "--dry-run"]
    commands = {
        "ffsplit inspect MODEL": ["inspect", str(model)],
        "ffsplit compress MODEL --recipe flap --dtype bfloat16 --dry-run": ["compress", str(model), *flags],
    }
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return [
        TimedCommand.timed(
            name, [sys.executable, "-m", "ffsplit.cli", *arguments], environment, times=REPEATS
        )
        for name, arguments in commands.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
