"""What a command's process ends with, whatever happens in it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ffsplit import logs
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.home import settle_home
from ffsplit.redaction import guarded_streams

DONE, FAILED, MISTAKE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
DESCRIPTION = """\
exit codes:
  0    done
  1    a failure while running
  2    a mistake in the command, a file or a setting
  3    finished, but refused by a gate
  130  interrupted; nothing was committed
"""


@guarded_streams()
def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command. An error is one line on stderr, and the exit code that goes with it."""
    try:
        settle_home()
        logs.set_up(logs.asked_for())
        with _terminated_as_interrupted():
            return run()
    except ConfigError as error:
        print(f"ffsplit: {error}", file=sys.stderr)
        return MISTAKE
    except FFSplitError as error:
        print(f"ffsplit: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read the output has enough, as in `ffsplit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("ffsplit: interrupted, nothing was committed", file=sys.stderr)
        return INTERRUPTED


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
