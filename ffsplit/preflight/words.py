"""A pre-flight as a line in a log."""

from __future__ import annotations

from ffsplit.preflight.records import Preflight
from ffsplit.report.humanize import duration, size


def in_one_line(flight: Preflight, *, asked: int | None = None) -> str:
    """Memory, disk and time, whether the model is held whole, and that more workers were asked for."""
    hungriest = max(flight.stages, key=lambda stage: stage.memory_bytes)
    workers = flight.machine.num_workers
    there = "" if hungriest.available_bytes is None else f" of {size(hungriest.available_bytes)}"
    of_those = f" ({asked} asked for, one a core)" if asked is not None and asked > workers else ""
    totals = flight.totals
    parts = [
        f"{workers} worker{'s' if workers > 1 else ''}{of_those}",
        f"up to {size(hungriest.memory_bytes)} of memory each{there}",
        f"{size(flight.temporary.needed_bytes)} of temporary files",
        f"{size(flight.store.needed_bytes)} in {flight.store.place}",
    ]
    if flight.cache.needed_bytes:
        parts.append(f"{size(flight.cache.needed_bytes)} of cached inputs")
    in_all = f"in all {size(totals.memory_bytes)} of memory and {size(totals.disk_bytes)} of disk"
    parts.append(in_all if totals.seconds is None else f"{in_all}, about {duration(totals.seconds)}")
    if flight.block_by_block:
        parts.append("one block of the model at a time")
    return f"pre-flight: {', '.join(parts)}".replace("\u00a0", " ")
