"""The table of `ffsplit benchmark`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ffsplit.artifacts.benchmarks import BenchmarkRecord, Timing
from ffsplit.report.humanize import milliseconds, number, shape, size, times
from ffsplit.report.noise import described, load_in_words, spread_in_words

WIDTH = 110


def print_benchmark(record: BenchmarkRecord) -> None:
    """Both models at each shape, with what the removed work could give at most beside it."""
    title = f"{record.device}, {record.dtype}, {record.num_threads} threads, both in turn"
    table = Table("", "original", "compressed", "speed-up", "limit", "share", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for timing in record.timings:
        _add(table, timing)
    before, after = record.original, record.compressed
    loads = [milliseconds(1e3 * each.load_s) for each in (before, after)]
    table.add_row("load", *loads, times(before.load_s / after.load_s))
    if before.peak_memory_bytes is not None and after.peak_memory_bytes is not None:
        table.add_row("peak memory", size(before.peak_memory_bytes), size(after.peak_memory_bytes))
    Console(width=WIDTH).print(table)
    if record.load is not None:
        print(load_in_words(record.load))
    if disturbed := described(_tails(record), record.load):
        print(f"warning: {disturbed}".replace("\u00a0", " "))


def _tails(record: BenchmarkRecord) -> dict[str, float]:
    """p95 over p50 of every model at every shape."""
    return {
        f"{each.phase} at {shape(each.batch_size, num_tokens=each.num_tokens)}: the {name}'s": (
            figures.p95_ms / figures.p50_ms
        )
        for each in record.timings
        for name, figures in (("original", each.original), ("compressed model", each.compressed))
    }


def _add(table: Table, timing: Timing) -> None:
    first, second = timing.original, timing.compressed
    table.add_row(
        f"{timing.phase} {timing.batch_size} x {timing.num_tokens}, p50",
        milliseconds(first.p50_ms),
        milliseconds(second.p50_ms),
        times(timing.speedup),
        f"{times(timing.limit)} by {timing.limited_by}",
        f"{timing.share_of_limit:.0%}",
    )
    notes = {"p95": spread_in_words(timing.spread), "p99": ""}
    for name, note in notes.items():
        figures = (getattr(each, f"{name}_ms") for each in (first, second))
        table.add_row(f"  {name}", *map(milliseconds, figures), note)
    table.add_row("  tokens/s", number(first.tokens_per_s), number(second.tokens_per_s))
