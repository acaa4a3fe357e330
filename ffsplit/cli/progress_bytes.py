"""Progress of a transfer: a bar on a terminal, a plain line now and then in a log. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ffsplit import streams
from ffsplit.progress import LINE_EVERY_S


@contextmanager
def bytes_to_stderr(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with bytes done and bytes in all."""
    if not sys.stderr.isatty():
        yield _lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(name: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_EVERY_S:
            last = now
            streams.note(f"{name}: {done:,} of {total:,} bytes")

    return show
