"""A model's process, as the batch sees it: its output, its exit, and its interruption with the batch."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ffsplit.config import JobConfig, Record
from ffsplit.directories import temporary_folder
from ffsplit.errors import is_out_of_memory
from ffsplit.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, REFUSED, exit_code_of
from ffsplit.machine import oom_kills
from ffsplit.zoo.batch import ModelResult

# One model of a batch, in its own process: whatever happens to it, the batch continues.
#
# The request is one line on stdin, which stays open. When stdin closes, the batch has ended, and this
# process ends too.

LEAVE_WITHIN_S = 60.0
"""How long an interrupted model may take to end by itself."""


class Request(Record):
    """The job to run, the file to write its result to, and one that tells that memory ran out."""

    job: JobConfig
    result_file: str
    memory_file: str


def main() -> int:
    request = Request.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_follow_the_batch, daemon=True).start()
    return exit_code_of(lambda: _run(request))


def _follow_the_batch() -> None:
    """Interrupt this process, as Ctrl-C would, when the batch has ended."""
    with suppress(OSError):  # an unreadable stdin counts as closed
        while os.read(0, 4096):  # not sys.stdin: this thread would hold its lock at exit
            pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(LEAVE_WITHIN_S)
    os._exit(INTERRUPTED)  # a pool interrupted while it took work can deadlock at exit


def _run(request: Request) -> int:
    from ffsplit.run.driver import run_to_end
    from ffsplit.zoo.batch import ModelResult

    try:
        finished = run_to_end(request.job)
    except Exception as error:
        if is_out_of_memory(error):
            Path(request.memory_file).touch()
        raise
    result = ModelResult.of(finished.manifest, state=finished.state, report=finished.report)
    Path(request.result_file).write_text(result.model_dump_json(), "utf-8")
    return REFUSED if finished.state == "refused" else DONE


STOP_WITHIN_S = 10.0
"""How long an interrupted process may take to clean up before it is killed."""
LAST_WORDS_WITHIN_S = 5.0
"""How long to read the output after a process has ended: its children may keep it open for ever."""
LOOK_EVERY_S = 0.1
LONGEST_LINE = 1 << 20

Say = Callable[[str], None]


class Ended(NamedTuple):
    """How a process ended: its exit code (or minus a signal's number), last line of output, and result."""

    exit_code: int
    last_words: str
    result: ModelResult | None
    is_out_of_memory: bool = False


async def run_process(job: JobConfig, say: Say, *, within_s: float) -> Ended:
    """Run one job in its own process. `say` gets every line that it prints.

    The process is interrupted, as by Ctrl-C, if the caller is cancelled or dies, or if it takes longer than
    `within_s`.
    """
    async with _heard(say) as (heard, output):
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ffsplit.zoo.process"),
                stdin=PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C reaches it only through the batch, and once
            )
        finally:
            os.close(output)
        return await _see_through(process, job, heard, within_s=within_s)


async def _see_through(process: Process, job: JobConfig, heard: _Heard, *, within_s: float) -> Ended:
    """Send a process its request, and wait for it."""
    kills = oom_kills()
    with temporary_folder() as folder:
        result_file, memory_file = folder / "result.json", folder / "out-of-memory"
        try:
            assert process.stdin is not None
            request = Request(job=job, result_file=str(result_file), memory_file=str(memory_file))
            with suppress(ConnectionError):  # it died before it read the request: its exit code is reported
                process.stdin.write(request.model_dump_json().encode() + b"\n")
                await process.stdin.drain()
            exit_code = await _wait(process, within_s=within_s)
            last_words = await heard.until_quiet()
        finally:
            await _end(process)
        if exit_code is None:
            why = f"interrupted: not done after {within_s / 3600:g} h (attempt_hours of the zoo file)"
            return Ended(FAILED, why, None)
        result = _read(result_file)
        if exit_code in (DONE, REFUSED) and result is None:
            last_words = f"its process ended with exit code {exit_code}, but wrote no result"
        has_failed = exit_code not in (DONE, MISTAKE, REFUSED, INTERRUPTED)
        was_killed = has_failed and oom_kills() > kills  # this process, or a worker of it on this machine
        words = _explain(exit_code, last_words)
        if was_killed and exit_code == -signal.SIGKILL:
            words = f"the system ran out of memory and killed its process; last output: {last_words}"
        return Ended(exit_code, words, result, was_killed or (has_failed and memory_file.exists()))


@asynccontextmanager
async def _heard(say: Say) -> AsyncIterator[tuple[_Heard, int]]:
    """A process's output, and the descriptor for it, which its children may still hold when it has ended."""
    reading, writing = os.pipe()
    stream = asyncio.StreamReader(limit=LONGEST_LINE)
    protocol = asyncio.StreamReaderProtocol(stream)
    pipe = os.fdopen(reading, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    try:
        yield _Heard(stream, say), writing
    finally:
        transport.close()


class _Heard:
    """A process's output: every line is passed on, and the last is kept."""

    def __init__(self, stream: asyncio.StreamReader, say: Say) -> None:
        self._stream, self._say = stream, say
        self._last = self._own = ""
        self._task = asyncio.create_task(self._listen())

    async def until_quiet(self) -> str:
        """The last of FFSplit's own lines, or else the last line, after the process has ended."""
        await asyncio.wait({self._task}, timeout=LAST_WORDS_WITHIN_S)
        self._task.cancel()
        return self._own or self._last

    async def _listen(self) -> None:
        while True:
            try:
                data = await self._stream.readline()
            except ValueError:  # skip a line that is too long
                continue
            if not data:
                return
            line = data.decode("utf-8", "replace").rstrip()
            if line:
                self._say(line)
                self._last = line
                self._own = line.removeprefix("ffsplit: ") if line.startswith("ffsplit: ") else self._own


async def _wait(process: Process, *, within_s: float) -> int | None:
    """A process's exit code; None if it takes too long.

    Polls, because process.wait() also waits for the pipes in newer versions of Python.
    """
    ends_at = time.monotonic() + within_s
    while process.returncode is None:
        if time.monotonic() > ends_at:
            return None
        await asyncio.sleep(LOOK_EVERY_S)
    return process.returncode


async def _end(process: Process) -> None:
    """Interrupt a process that still runs, then kill it."""
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode is not None:
        return
    if await _wait(process, within_s=STOP_WITHIN_S) is None:
        with suppress(ProcessLookupError):
            process.kill()
        await _wait(process, within_s=STOP_WITHIN_S)


def _explain(exit_code: int, last_words: str) -> str:
    if exit_code >= 0:
        return last_words or f"its process ended with exit code {exit_code} and printed nothing"
    with suppress(ValueError):
        return f"its process was killed by {signal.Signals(-exit_code).name}; last output: {last_words}"
    return f"its process was killed by signal {-exit_code}; last output: {last_words}"


def _read(file: Path) -> ModelResult | None:
    try:
        return ModelResult.model_validate_json(file.read_text("utf-8"))
    except (OSError, ValidationError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())
