"""One model of a batch, in its own process: whatever happens to it, the batch continues.

The request is one line on stdin, which stays open. When stdin closes, the batch has ended, and this ends too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ffsplit.config import JobConfig, Record
from ffsplit.exit_codes import DONE, INTERRUPTED, REFUSED, exit_code_of

LEAVE_WITHIN_S = 60.0
"""How long an interrupted model may take to end by itself."""


class Request(Record):
    """The job to run, and the file to write its result to."""

    job: JobConfig
    result_file: str


def main() -> int:
    request = Request.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_follow_the_batch, daemon=True).start()
    return exit_code_of(lambda: _run(request))


def _follow_the_batch() -> None:
    """Interrupt this process, as Ctrl-C would, when the batch has ended."""
    with suppress(OSError):  # an unreadable stdin has ended as well
        while os.read(0, 4096):  # not sys.stdin: this thread would hold its lock at exit
            pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(LEAVE_WITHIN_S)
    os._exit(INTERRUPTED)  # a pool that was interrupted as it took work can wait for itself without end


def _run(request: Request) -> int:
    from ffsplit.run.driver import run_to_end
    from ffsplit.zoo.batch import ModelResult

    finished = run_to_end(request.job)
    result = ModelResult.of(finished.manifest, state=finished.state, report=finished.report)
    Path(request.result_file).write_text(result.model_dump_json(), "utf-8")
    return REFUSED if finished.state == "refused" else DONE


if __name__ == "__main__":
    raise SystemExit(main())
