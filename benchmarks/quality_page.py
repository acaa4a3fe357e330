"""The page and the plot of the quality benchmark, from its runs.

    python -m benchmarks.quality_page FILE.jsonl ...

makes them anew of the runs on the page and those in the files; a run in a file replaces its older self.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

PEERS = ("svd", "whitened-svd", "paper", "norm-prune", "flap")
RECIPES = (*PEERS, "refit", "fast", "best", "tiny", "int8")
KEEPS = (0.3535, 0.5, 0.2, 0.125)
DECODER_KEEPS = (0.9, 0.8, 0.65, 0.5, 0.3535)
BASE_ENCODER = "STS-B-base"
BASE_ENCODER_GRID = (("fast", "best"), (0.3535,))
"""Its recipes and budgets."""

TITLES = {
    "smollm2-135m": "SmolLM2-135M-Instruct, a Llama of 30 SwiGLU layers, dequantized from its 4-bit file",
    "STS-B": "all-MiniLM-L6-v2 on STS-B dev: Spearman x 100 of the cosines of mean-pooled sentences",
    BASE_ENCODER: "all-mpnet-base-v2, of BERT-base's size, on STS-B dev: Spearman x 100, as above",
    "SST-2": "all-MiniLM-L6-v2 fine-tuned on SST-2, on its dev split: accuracy in %",
    "corpus": "a small Llama on running English text held out: perplexity, lower is better",
}
FIDELITY = {
    "STS-B": "pooled_cosine",
    BASE_ENCODER: "pooled_cosine",
    "SST-2": "pooled_cosine",
    "corpus": "kl_divergence",
}
"""What is shown beside the score. Decoders that are scored on texts show the KL of each."""


MOST_BEHIND = 12.0
"""Points under the original that a plot shows."""


@dataclass(frozen=True)
class Run:
    """One recipe at one budget with one seed, scored.

    `domains` and `repeated` are a decoder's (`quality_text.py`). `seconds` are the run's without measuring;
    if it reused statistics, with those that they took. `wall_s` are the cell's, scoring included. At most
    `num_beside` other runs shared the card.
    """

    case: str
    recipe: str
    keep: float
    seed: int
    metric: str
    original: float
    score: float
    fidelity: dict[str, float]
    ffn_bytes: int
    original_ffn_bytes: int
    num_rows: int
    num_tokens: int
    hardware: dict[str, str | int]
    versions: dict[str, str]
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    repeated: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    reused_statistics: bool = False
    peak_gpu_bytes: int | None = None
    num_beside: int = 0
    wall_s: float | None = None

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.case, self.recipe, self.keep, self.seed


def read_runs(path: Path) -> list[Run]:
    """The runs in a file, which need not be there."""
    if not path.is_file():
        return []
    return [Run(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


class Row(NamedTuple):
    """One recipe at one budget: the median over its seeds, and the extremes."""

    recipe: str
    keep: float
    score: float
    lowest: float
    highest: float
    num_seeds: int
    fidelity: float
    ffn_bytes: int
    machines: tuple[str, ...]


def rows_of(runs: Sequence[Run], order: Sequence[str]) -> list[Row]:
    """The rows of one case, largest budget first, recipes in their order."""
    rows = []
    for keep in sorted({run.keep for run in runs}, reverse=True):
        for recipe in order:
            same = [run for run in runs if (run.keep, run.recipe) == (keep, recipe)]
            if same:
                scores = [run.score for run in same]
                figures = [run.fidelity[FIDELITY.get(run.case, "kl_divergence")] for run in same]
                median = statistics.median(scores)
                extremes = min(scores), max(scores)
                rows.append(
                    Row(
                        recipe,
                        keep,
                        median,
                        *extremes,
                        len(same),
                        statistics.median(figures),
                        statistics.median_low([run.ffn_bytes for run in same]),
                        tuple(sorted({machine(run) for run in same})),
                    )
                )
    return rows


def write_page(new: Sequence[Run], *, folder: Path) -> None:
    """quality.md, quality.png and the runs themselves, quality.jsonl, whose other runs stay."""
    from benchmarks.quality_decoder_page import decoder_section

    merged = {run.key: run for run in (*read_runs(folder / "quality.jsonl"), *new)}
    runs = sorted(merged.values(), key=lambda run: run.key)
    order = (*RECIPES, *sorted({run.recipe for run in runs} - {*RECIPES}))
    found = {run.case for run in runs}
    names = [*(name for name in TITLES if name in found), *sorted(found - {*TITLES})]
    machines = {each: index + 1 for index, each in enumerate(sorted({machine(run) for run in runs}))}
    lines = [
        "# Quality",
        "",
        "`make bench-quality DATA=folder MODELS=folder` (its options with `python -m benchmarks.quality "
        "--help`). Medians over the seeds, which draw the calibration rows and the order of healing; in "
        "brackets the lowest and the highest. No recipe saw a text that it is scored on.",
        "",
        "Run on:",
        *(f"{number}. {each}" for each, number in machines.items()),
    ]
    for name in names:
        mine = [run for run in runs if run.case == name]
        grid = order, DECODER_KEEPS if mine[0].domains else KEEPS
        recipes, keeps = BASE_ENCODER_GRID if name == BASE_ENCODER else grid
        section = decoder_section if mine[0].domains else table
        title = TITLES.get(name, name)
        lines += ["", *section(mine, order, machines, title), *not_run(mine, recipes, keeps)]
    lines += ["", "Every run: [quality.jsonl](quality.jsonl)."]
    lines += ["", "What else was tried: [quality-tried.md](quality-tried.md).", ""]
    lines += ["![scores against FFN bytes](quality.png)", ""]
    (folder / "quality.md").write_text("\n".join(lines), "utf-8")
    (folder / "quality.jsonl").write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs), "utf-8")
    draw(runs, names, folder / "quality.png", order)


def machine(run: Run) -> str:
    device = run.hardware.get("gpu") or f"{run.hardware['processor']}, {run.hardware['num_cpus']} cores"
    versions = run.versions
    libraries = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"{device}, {libraries}, this package's algorithm {versions.get('algorithm', 'unknown')}"


def table(runs: Sequence[Run], order: Sequence[str], machines: Mapping[str, int], title: str) -> list[str]:
    """One case as a section; `machines` are the numbers they have on the page."""
    first = runs[0]
    label = FIDELITY[first.case].replace("_", " ")
    lines = [
        f"## {first.case}",
        "",
        f"{title}. Dense: **{first.original:.2f}**.",
        "",
        f"| keep | recipe | {first.metric} | against dense | {label} | FFN bytes | seeds | run on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(runs, order):
        spread = f" [{row.lowest:.2f}, {row.highest:.2f}]" if row.num_seeds > 1 else ""
        share = row.ffn_bytes / first.original_ffn_bytes
        lines.append(
            f"| {row.keep:g} | {row.recipe} | {row.score:.2f}{spread} | {row.score - first.original:+.2f} "
            f"| {row.fidelity:.4f} | {row.ffn_bytes:,} (1/{1 / share:.1f}) | {row.num_seeds} "
            f"| {', '.join(str(machines[each]) for each in row.machines)} |"
        )
    return lines


def not_run(runs: Sequence[Run], order: Sequence[str], keeps: Sequence[float]) -> list[str]:
    """What one case lacks of the grid, in a line where there is something."""
    found = {(run.keep, run.recipe) for run in runs}
    whole = {run.recipe for run in runs if run.keep == 1}  # such a recipe has no other budget
    missing = {
        keep: [recipe for recipe in order if recipe not in whole and (keep, recipe) not in found]
        for keep in sorted(keeps)
    }
    names = {keep: "all" if recipes == [*order] else ", ".join(recipes) for keep, recipes in missing.items()}
    parts = [f"{keep:g} {recipes}" for keep, recipes in reversed(names.items()) if recipes]
    return ["", f"Not run: {'; '.join(parts)}."] if parts else []


def draw(runs: Sequence[Run], names: Sequence[str], path: Path, order: Sequence[str]) -> None:
    """Score against bytes, a panel a case. What is far behind the others is out of the picture."""
    from matplotlib.figure import Figure  # which a machine that only runs the cells need not have

    figure = Figure(figsize=(5.0 * len(names) + 1.2, 4.4), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        mine = [run for run in runs if run.case == name]
        rows = rows_of(mine, order)
        for number, recipe in enumerate(order):
            points = sorted((row.ffn_bytes / 1e6, row.score) for row in rows if row.recipe == recipe)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=recipe)
        axes.axhline(mine[0].original, color="grey", linestyle="--", label="dense")
        label = f"perplexity, {next(iter(mine[0].domains))}" if mine[0].domains else mine[0].metric
        axes.set(xlabel="FFN size (MB)", ylabel=label, title=name)
        axes.set_xlim(0, 1.08 * max(row.ffn_bytes for row in rows) / 1e6)
        if mine[0].metric == "perplexity":
            best = min(row.score for row in rows)
            axes.set_ylim(
                0.95 * min(best, mine[0].original), min(1.05 * max(r.score for r in rows), 3 * best)
            )
        else:
            worst = max(min(row.score for row in rows), mine[0].original - MOST_BEHIND)
            axes.set_ylim(bottom=worst - 0.5)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    files = [Path(each) for each in sys.argv[1:]]
    if absent := [str(each) for each in files if not each.is_file()]:
        sys.exit(f"no file {', '.join(absent)}: give the results.jsonl of benchmarks.quality")
    write_page([run for each in files for run in read_runs(each)], folder=Path(__file__).parent)
