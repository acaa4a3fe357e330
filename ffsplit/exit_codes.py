"""What a command's process ends with, whatever happens in it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ffsplit import logs, streams
from ffsplit.errors import ConfigError, FFSplitError

DONE, FAILED, MISTAKE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
DESCRIPTION = """\
exit codes:
  0    done
  1    a failure while running, or a result that could not be printed
  2    a mistake in the command, a file or a setting; nothing was written
  3    finished, but refused by a gate
  130  interrupted; nothing was committed
"""


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command. An error is one line on stderr, and the exit code that goes with it.

    Where stderr or stdout cannot be written the command goes on, and ends as it would with them.
    """
    with streams.guarded():
        try:
            logs.set_up(logs.asked_for())
            with _terminated_as_interrupted():
                return run()
        except ConfigError as error:
            streams.note(f"ffsplit: {error}")
            return MISTAKE
        except FFSplitError as error:
            streams.note(f"ffsplit: {error}")
            return FAILED
        except KeyboardInterrupt:
            streams.note("ffsplit: interrupted, nothing was committed")
            return INTERRUPTED


def checked_output(code: int, *, is_result: bool) -> int:
    """The exit code. Raises FFSplitError when all went well, but the result did not reach stdout."""
    if (lost := streams.lost_output()) is not None:
        if is_result and code == DONE:
            raise FFSplitError(f"the result could not be written to stdout: {lost}")
        streams.note(f"ffsplit: what is printed on stdout is incomplete: {lost}")
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: what it began is cleared away first."""

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: clearing away has to come to its end
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
