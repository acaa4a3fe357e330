"""The page of what benchmarks/scaling.py found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.simulated_cluster import Cost, Reduction
from ffsplit.machine import describe_environment


class Rate(NamedTuple):
    """How a number of workers did in one turn."""

    num_workers: int
    items_per_minute: float
    tokens_per_s: float
    rays_share: float


class Overhead(NamedTuple):
    """Tokens/s on one thread: a plain forward, one with statistics, one with sampled inputs too."""

    plain: float
    watched: float
    sampled: float


class Found(NamedTuple):
    """All that the benchmark found: of calibration and compression a list of rates a turn."""

    load: float
    overhead: Overhead
    calibration: Sequence[Sequence[Rate]]
    compression: Sequence[Sequence[Rate]]
    rerun_s: float
    dispatched: Cost
    through_ray: Cost
    reductions: Sequence[Reduction]


class GPURun(NamedTuple):
    """A run with a number of GPUs: seconds by stage and of the whole command, and where its workers were."""

    num_gpus: int
    stages: dict[str, float]
    seconds: float
    placed: Sequence[str]


class Row(NamedTuple):
    """A number of workers: medians over all turns."""

    num_workers: int
    rate: float
    over_one: float
    rays_share: float

    def __str__(self) -> str:
        return f"| {self.num_workers} | {self.rate:,.0f} | {self.over_one:.2f} | {self.rays_share:.1%} |"


def rows_of(turns: Sequence[Sequence[Rate]], *, of: Callable[[Rate], float]) -> list[Row]:
    return [
        Row(
            rates[0].num_workers,
            median(map(of, rates)),
            median(of(rate) / of(turn[0]) for rate, turn in zip(rates, turns, strict=True)),
            median(rate.rays_share for rate in rates),
        )
        for rates in zip(*turns, strict=True)
    ]


def write_page(found: Found, page: Path) -> None:
    """The results; the reasoning that goes with the figures is in scaling-reasons.md."""
    reasons = Path(__file__).with_name("scaling-reasons.md").read_text("utf-8")
    parts = [_head(found), *_workers(found), _overhead(found.overhead)]
    parts += [f"A run that is committed already, from the shell and back: {found.rerun_s:.2f} s."]
    text = "\n\n".join([*parts, *_simulated(found), reasons])
    page.write_text(with_gpu_section(text, page.with_name("scaling_gpu.json")), "utf-8")


GPU_HEADING = "## GPUs of one host"


def with_gpu_section(page: str, record: Path) -> str:
    """The page with the section on GPUs at its end, as `scaling_gpu.py` recorded it."""
    page = page.partition(f"\n{GPU_HEADING}\n")[0].rstrip("\n") + "\n"
    if not record.is_file():
        return page
    found = json.loads(record.read_text("utf-8"))
    runs = [GPURun(**each) for each in found["runs"]]
    counts = [str(run.num_gpus) for run in runs]
    rows = []
    for stage in [*runs[0].stages, "the whole command"]:
        seconds = [run.stages.get(stage, run.seconds) for run in runs]
        speedups = [f"{seconds[0] / each:.2f}" for each in seconds[1:]]
        rows.append(f"| {' | '.join([stage, *(f'{each:.1f} s' for each in seconds), *speedups])} |")
    header = ("stage", *(f"{count} GPU" for count in counts), *(f"{count} over one" for count in counts[1:]))
    parts = [
        f"Written by `python -m benchmarks.scaling_gpu`. {found['about']}. A worker per GPU, through Ray; a "
        "stage's seconds contain the start of its workers.",
        _table(header, rows),
        f"Where the log of the run on {counts[-1]} says that its workers were:",
        "```\n" + "\n".join(runs[-1].placed) + "\n```",
    ]
    return "\n".join([page, GPU_HEADING, "", "\n\n".join(parts), ""])


def _head(found: Found) -> str:
    hardware = describe_environment().hardware
    return (
        "# How the work spreads\n\nWritten by `make bench-scaling`.\n\n"
        f"{hardware['processor']}, {hardware['num_cpus']} cores; all-MiniLM-L6-v2, one thread a worker. "
        f"Load average before the start: {found.load:.1f}. Medians of {len(found.calibration)} turns."
    )


def _workers(found: Found) -> list[str]:
    return [
        _table(
            ("workers", "calibration, tokens/s", "over one", "Ray's share"),
            map(str, rows_of(found.calibration, of=lambda rate: rate.tokens_per_s)),
        ),
        _table(
            ("workers", "compression, layers/min", "over one", "Ray's share"),
            map(str, rows_of(found.compression, of=lambda rate: rate.items_per_minute)),
        ),
    ]


def _overhead(cost: Overhead) -> str:
    names = ("plain", "with the statistics of every neuron", "with a tenth of the FFN inputs kept as well")
    rows = [
        f"| {name} | {rate:,.0f} | {rate / cost.plain:.3f} |" for name, rate in zip(names, cost, strict=True)
    ]
    return _table(("forward on the same batches", "tokens/s", "of the plain one"), rows)


def _simulated(found: Found) -> list[str]:
    rows = [found.dispatched.row("the driver's part alone"), found.through_ray.row("the same through Ray")]
    return [
        _table(("stub work", "workers", "shards", "driver's CPU a shard", "in all"), rows),
        _table(
            ("reduction", "MB read", "seconds, one thread", "peak memory over the start, MB"),
            [each.row() for each in found.reductions],
        ),
    ]


def _table(header: Sequence[str], rows: Sequence[str] | map[str]) -> str:
    return "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *rows])
