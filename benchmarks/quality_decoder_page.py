"""The section of the quality page about a decoder: a table a domain, its own text, and what runs took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.quality_page import Run, machine
from benchmarks.quality_text import DOMAINS, GRAM, WRITTEN_TOKENS

Figure = Callable[[Run], float | None]


def decoder_section(
    runs: Sequence[Run], order: Sequence[str], machines: Mapping[str, int], title: str
) -> list[str]:
    """One decoder as a section; `machines` are the numbers they have on the page."""
    first = runs[0]
    keeps = sorted({run.keep for run in runs}, reverse=True)
    names = [name for name in order if any(run.recipe == name for run in runs)]
    cells = {(run.recipe, run.keep): [] for run in runs}  # type: dict[tuple[str, float], list[Run]]
    for run in runs:
        cells[run.recipe, run.keep].append(run)
    numbers = ", ".join(str(number) for number in sorted({machines[machine(run)] for run in runs}))
    lines = [
        f"## {first.case}",
        "",
        f"{title}. Calibrated and healed on running English prose; recipes with an `own_share` let the "
        "model write that share of the text itself. No other domain was read. Perplexity (lower is better), "
        "in brackets the KL divergence from the original in nats per token; **bold** is the lowest of a "
        f"column. Run on {numbers}.",
    ]
    for domain in first.domains:
        dense = first.domains[domain]
        lines += [
            "",
            f"### {first.case}: {domain}",
            "",
            f"{DOMAINS[domain][:1].upper()}{DOMAINS[domain][1:]}; {int(dense['num_tokens']):,} tokens. "
            f"Dense: **{_short(dense['original'])}**.",
            "",
        ]
        lines += _table(
            names,
            keeps,
            cells,
            lambda run, name=domain: run.domains[name]["perplexity"],
            lambda run, name=domain: run.domains[name]["kl"],
        )
    lines += [
        "",
        f"### {first.case}: what it writes",
        "",
        f"Repeated {GRAM}-grams in greedy continuations of {WRITTEN_TOKENS} tokens, in % of all: a "
        f"model that has collapsed writes loops. Dense: **{_short(100 * first.repeated['original'])}**.",
        "",
        *_table(names, keeps, cells, lambda run: 100 * run.repeated["compressed"]),
        "",
        f"### {first.case}: what a run takes",
        "",
        "Seconds without measuring, with the GPU memory at its peak if it ran on one; FFN bytes at the "
        f"smallest budget, as a fraction of the original's. {_shared(runs)}".rstrip(),
        "",
        *_costs(names, keeps, cells),
    ]
    return lines


def _table(
    names: Sequence[str],
    keeps: Sequence[float],
    cells: Mapping[tuple[str, float], Sequence[Run]],
    figure: Figure,
    beside: Figure | None = None,
) -> list[str]:
    """Recipes down, budgets across: medians over the seeds, the lowest of each column bold."""
    lines = _head(keeps)
    medians = {key: _median(figure, runs) for key, runs in cells.items()}
    lowest = {keep: min(value for (_, of), value in medians.items() if of == keep) for keep in keeps}
    for name in names:
        row = []
        for keep in keeps:
            value = medians.get((name, keep))
            if value is None:
                row.append("")
                continue
            text = f"**{_short(value)}**" if value == lowest[keep] else _short(value)
            row.append(text if beside is None else f"{text} ({_median(beside, cells[name, keep]):.3f})")
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def _costs(
    names: Sequence[str], keeps: Sequence[float], cells: Mapping[tuple[str, float], Sequence[Run]]
) -> list[str]:
    lines = _head(keeps, "FFN bytes")
    for name in names:
        row = []
        for keep in keeps:
            runs = cells.get((name, keep), ())
            parts = [f"{_median(lambda run: run.seconds, runs):.0f} s"] if runs else []
            if runs and runs[0].peak_gpu_bytes is not None:
                parts.append(f"{_median(lambda run: run.peak_gpu_bytes, runs) / 1e9:.1f} GB")
            row.append(", ".join(parts))
        (*_, smallest) = (cells[name, keep][0] for keep in keeps if (name, keep) in cells)
        share = smallest.original_ffn_bytes / smallest.ffn_bytes
        lines.append(f"| {name} | {' | '.join(row)} | 1/{share:.1f} |")
    return lines


def _shared(runs: Sequence[Run]) -> str:
    most = max(run.num_beside for run in runs)
    return f"Up to {most} other runs shared the card, so the seconds are upper bounds." if most else ""


def _head(keeps: Sequence[float], *more: str) -> list[str]:
    columns = ["recipe", *(f"keep {keep:g}" for keep in keeps), *more]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _median(figure: Figure, runs: Sequence[Run]) -> float:
    return statistics.median([value for run in runs if (value := figure(run)) is not None])


def _short(value: float) -> str:
    """About four digits."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
