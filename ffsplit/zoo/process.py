"""A model's process, as the batch sees it: what it says, how it ends, and its end when the batch ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ffsplit.config import JobConfig
from ffsplit.temporary import temporary_folder
from ffsplit.zoo.batch import Judged
from ffsplit.zoo.driver import Request

STOP_WITHIN_S = 10.0
"""How long an interrupted process may take to leave nothing behind, before it is killed."""
LONGEST_LINE = 1 << 20

Say = Callable[[str], None]


class Ended(NamedTuple):
    """How a process ended: its exit code, minus a signal's number, its last words, and its result."""

    exit_code: int
    last_words: str
    result: Judged | None


async def run_process(job: JobConfig, say: Say) -> Ended:
    """Run one job in a process of its own; `say` gets every line that it prints.

    When the caller is cancelled, or dies, the process is interrupted as by Ctrl-C.
    """
    with temporary_folder() as folder:
        result_file = folder / "result.json"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ffsplit.zoo.driver"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LONGEST_LINE,
            start_new_session=True,  # a terminal's Ctrl-C comes through the batch alone, and once
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            request = Request(job=job, result_file=str(result_file))
            with suppress(ConnectionError):  # it died before it read: its exit code says so
                process.stdin.write(request.model_dump_json().encode() + b"\n")
                await process.stdin.drain()
            last_words = await _listen(process.stdout, say)
            exit_code = await process.wait()
        finally:
            await _end(process)
        return Ended(exit_code, _explain(exit_code, last_words), _read(result_file))


async def _listen(stream: asyncio.StreamReader, say: Say) -> str:
    """Pass every line on; returns the last of FFSplit's own, or the last of all."""
    last = own = ""
    while True:
        try:
            data = await stream.readline()
        except ValueError:  # a line too long to be meant for anybody
            continue
        if not data:
            return own or last
        line = data.decode("utf-8", "replace").rstrip()
        if line:
            say(line)
            last = line
            own = line.removeprefix("ffsplit: ") if line.startswith("ffsplit: ") else own


async def _end(process: Process) -> None:
    """Leave no process behind."""
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is not None:
        return
    try:
        await asyncio.wait_for(process.wait(), STOP_WITHIN_S)
    except (TimeoutError, asyncio.TimeoutError):
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _explain(exit_code: int, last_words: str) -> str:
    if exit_code >= 0:
        return last_words or f"its process ended with exit code {exit_code} and said nothing"
    with suppress(ValueError):
        return f"its process was ended by {signal.Signals(-exit_code).name}; last it said: {last_words}"
    return f"its process was ended by signal {-exit_code}; last it said: {last_words}"


def _read(file: Path) -> Judged | None:
    try:
        return Judged.model_validate_json(file.read_text("utf-8"))
    except (OSError, ValidationError):
        return None
