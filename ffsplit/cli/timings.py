"""The table of `ffsplit benchmark`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ffsplit.artifacts.benchmarks import BenchmarkRecord, Timing
from ffsplit.report.humanize import milliseconds, number, size, times

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
    for name in ("p95", "p99"):
        figures = (getattr(each, f"{name}_ms") for each in (first, second))
        table.add_row(f"  {name}", *map(milliseconds, figures))
    table.add_row("  tokens/s", number(first.tokens_per_s), number(second.tokens_per_s))
