"""What a command's process ends with, whatever happens in it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ffsplit import logs
from ffsplit.errors import ConfigError, FFSplitError, reason_of

DONE, FAILED, MISTAKE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
DEBUG_VARIABLE = "FFSPLIT_DEBUG"
DESCRIPTION = """\
exit codes:
  0    done
  1    a failure while running
  2    a mistake in the command, a file or a setting
  3    finished, but refused by a gate
  130  interrupted; nothing was committed
"""


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command. An error is one line on stderr, and the exit code that goes with it."""
    try:
        logs.set_up(logs.asked_for())
        with _terminated_as_interrupted():
            return run()
    except ConfigError as error:
        _report(error)
        return MISTAKE
    except FFSplitError as error:
        _report(error)
        return FAILED
    except BrokenPipeError:  # whoever read the output has enough, as in `ffsplit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("ffsplit: interrupted, nothing was committed", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # whatever nobody foresaw
        what = f"{type(error).__name__}: {reason_of(error)}"
        _report(FFSplitError(f"an unforeseen error, {what} (--debug shows where)"), cause=error)
        return FAILED


def show_tracebacks() -> None:
    """Have this process, and those that it starts, print the traceback of an error before its line."""
    os.environ[DEBUG_VARIABLE] = "1"


def _report(error: FFSplitError, *, cause: Exception | None = None) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        shown: BaseException | None = cause or error
        seen: set[int] = set()
        while shown is not None and id(shown) not in seen:  # what `from None` hides is asked for here
            seen.add(id(shown))
            shown.__suppress_context__ = False
            shown = shown.__cause__ or shown.__context__
        traceback.print_exception(cause or error)
    print(f"ffsplit: {error}", file=sys.stderr)


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
