"""The page of what benchmarks/large_models.py found."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import ffsplit
from benchmarks.watched_run import Peak, WatchedRun
from ffsplit.config import Record

GB = 1e9
NAMES = {
    "prepare": "look, digests, start Ray",
    "after calibrate": "reduce, plan",
    "after compress": "assemble",
    "after measure": "documents, publish",
}


class TimedCommand(Record):
    """What a command took, once for each time it was run."""

    name: str
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    load_before: float

    @classmethod
    def timed(
        cls, name: str, command: Sequence[str], environment: Mapping[str, str], *, times: int
    ) -> TimedCommand:
        """Run it so many times, and once before that, so that its files are in the page cache."""
        load, wall, cpu = os.getloadavg()[0], [], []
        for _ in range(times + 1):
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = subprocess.run(command, env=environment, capture_output=True, check=False)
            if done.returncode not in (0, 2):  # 2: the pre-flight said that a 70B does not fit here
                raise SystemExit(f"{name} failed: {done.stderr.decode()}")
            wall.append(time.monotonic() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return cls(name=name, wall_s=tuple(wall[1:]), cpu_s=tuple(cpu[1:]), load_before=load)


class Outcome(Record):
    """A model that went through a run that was killed and one that took it up."""

    runs: tuple[WatchedRun, ...]
    num_layers: int
    num_rows: int
    max_length: int
    keep: float
    memory: str
    written_s: float
    is_whole: bool
    manifest: ffsplit.Manifest

    @property
    def largest(self) -> int:
        """The largest anonymous memory of any process, in bytes."""
        return max(run.largest for run in self.runs)


def page(outcome: Outcome, commands: Sequence[TimedCommand]) -> str:
    lines = ["# Models larger than a worker", "", *_head(outcome)]
    for run in outcome.runs:
        lines += ["", *_run(run, outcome)]
    lines += ["", *_result(outcome)]
    if commands:
        lines += ["", *_commands(commands)]
    return "\n".join([*lines, ""])


def _head(outcome: Outcome) -> Iterator[str]:
    hardware, measured = outcome.manifest.environment.hardware, outcome.manifest.measurements
    assert measured is not None
    together = max(run.largest_together for run in outcome.runs) / GB
    others = max(run.cpu_share_of_others for run in outcome.runs)
    yield (
        f"`python -m benchmarks.large_models FOLDER`: a checkpoint of Llama-7B's shape"
        f"{'' if outcome.num_layers == 32 else f' with {outcome.num_layers} layers'}, random bf16 weights, "
        f"{measured.original_size.file_bytes / GB:.1f} GB, written file by file in {outcome.written_s:.0f} "
        f"s. {outcome.num_rows} sequences of {outcome.max_length} tokens; half of the neurons pruned (keep "
        f"{outcome.keep:g}), their mean output kept as a bias. Computed in bf16, {outcome.memory} allowed a "
        "worker, so that the model goes block by block."
    )
    yield ""
    yield (
        f"**No process ever held more than {outcome.largest / GB:.2f} GB of anonymous memory**, and all "
        f"processes of the run together {together:.2f} GB."
    )
    yield ""
    machine = f"{hardware['processor']}, {hardware['num_cpus']} cores"
    yield (
        f"{machine}, {int(hardware['memory_bytes']) / GB:.0f} GB. The cores were shared with other work, "
        f"which took up to {others:.0%} of their time: the seconds are upper bounds. Memory was read four "
        "times a second. Anonymous pages have to be in memory; file-backed ones (weights and hidden states, "
        "mapped) are kept there while there is room. All in GB, of the largest process of its kind."
    )


def _run(run: WatchedRun, outcome: Outcome) -> Iterator[str]:
    yield f"## {'Killed with SIGKILL half way through calibration' if run.killed else 'Resumed, to the end'}"
    yield ""
    yield "| stage | seconds | taken over | driver, anonymous | worker, anonymous | worker, file-backed |"
    yield "|---|---|---|---|---|---|"
    finished = {stage.name: stage for stage in outcome.manifest.stages}
    for stage in run.stages:
        driver, worker = (stage.peaks.get(role, Peak()) for role in ("driver", "worker"))
        memory = [driver.anonymous, worker.anonymous, worker.file_backed]
        cells = [f"{value / GB:.2f}" if value else "" for value in memory]
        taken = finished.get(stage.name)
        reused = f"{taken.num_reused} of {taken.num_items}" if taken and not run.killed else ""
        name = NAMES.get(stage.name, stage.name)
        yield f"| {name} | {stage.seconds:.0f} | {reused} | {' | '.join(cells)} |"


def _result(outcome: Outcome) -> Iterator[str]:
    measured = outcome.manifest.measurements
    assert measured is not None
    first, last = measured.blocks[0], measured.blocks[-1]
    scores = ", ".join(f"{name} {value:.4g}" for name, value in measured.fidelity.items())
    yield "## The result"
    yield ""
    yield (
        f"{measured.compressed_size.file_bytes / GB:.1f} GB in files of at most 5 GB; `ffsplit verify` finds "
        f"it {'whole' if outcome.is_whole else 'NOT whole'}. Random weights have no neurons that matter more "
        "than others, so much is lost; the figures only show that the comparison runs."
    )
    yield ""
    yield (
        f"Hidden states after block {first.layer}: relative error {first.relative_error:.3f}, cosine "
        f"{first.cosine:.4f}; after block {last.layer}: {last.relative_error:.3f}, {last.cosine:.4f}. "
        f"On held-out text: {scores}."
    )
    for each in measured.skipped:
        yield ""
        yield f"Not measured: {each}."


def _commands(commands: Sequence[TimedCommand]) -> Iterator[str]:
    load = max(command.load_before for command in commands)
    yield "## A model of 70 billion parameters, looked at"
    yield ""
    yield (
        "`python -m benchmarks.large_models FOLDER --part commands`: Llama-70B's shape, whose files have "
        f"true headers and holes for weights. Seconds of {len(commands[0].wall_s)} starts from the command "
        "line, Python's own start and all imports included: median, and lowest to highest. Load average "
        f"before: {load:.1f}."
    )
    yield ""
    yield "| command | on the clock | of the processor |"
    yield "|---|---|---|"
    for each in commands:
        cells = [
            f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in (each.wall_s, each.cpu_s)
        ]
        yield f"| `{each.name}` | {' | '.join(cells)} |"
