"""The exit code of a command, whatever happens in it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ffsplit import logs, streams
from ffsplit.directories import settle_home
from ffsplit.errors import LESS_MEMORY, ConfigError, FFSplitError, is_out_of_memory, reason_of
from ffsplit.redaction import guarded_streams

DONE, FAILED, MISTAKE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
DEBUG_VARIABLE = "FFSPLIT_DEBUG"
QUIET = {
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Variables by which libraries log errors alone, in this process and its children."""
COMPLETE_INSTALL = "this command needs ffsplit with its dependencies: pip install ffsplit, without --no-deps"
DESCRIPTION = """\
exit codes:
  0    done
  1    a failure while running, or a result that could not be printed
  2    a mistake in the command, a file or a setting; nothing was written
  3    completed, but a gate failed or is undecided (noisy timings);
       nothing was published
  130  interrupted; nothing was committed
"""


@guarded_streams()
def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command and return its exit code. An error is printed as one line on stderr.

    If stderr or stdout cannot be written, the command continues and ends as usual.
    """
    with streams.guarded():
        try:
            settle_home()
            logs.set_up(logs.asked_for())
            with _terminated_as_interrupted():
                return run()
        except ConfigError as error:
            _report(error)
            return MISTAKE
        except FFSplitError as error:
            _report(error)
            return FAILED
        except KeyboardInterrupt:
            streams.note("ffsplit: interrupted, nothing was committed")
            return INTERRUPTED
        except Exception as error:  # a bug, or an unforeseen error
            if isinstance(error, ModuleNotFoundError) and not (error.name or "ffsplit").startswith("ffsplit"):
                _report(ConfigError(f"{error.name} is not installed: {COMPLETE_INSTALL}"), cause=error)
                return MISTAKE
            what = f"{type(error).__name__}: {reason_of(error)}"
            if is_out_of_memory(error):
                _report(FFSplitError(f"out of memory, {what}; {LESS_MEMORY}"), cause=error)
                return FAILED
            _report(FFSplitError(f"unexpected error, {what} (--debug shows where)"), cause=error)
            return FAILED


def show_tracebacks() -> None:
    """Make this process and its children print the traceback of an error before its line."""
    os.environ[DEBUG_VARIABLE] = "1"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings of other libraries off stderr, unless --debug asks for them.

    Variables that are set stay as they are.
    """
    if os.environ.get(DEBUG_VARIABLE):
        yield
        return
    added = {name: value for name, value in QUIET.items() if name not in os.environ}
    last, level = logging.lastResort, logging.WARNING
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            if "PYTHONWARNINGS" in added:
                warnings.simplefilter("ignore")
            if last is not None:  # prints what a logger without a handler gets
                level = last.level
                last.setLevel(logging.ERROR)
            yield
    finally:
        if last is not None:
            last.setLevel(level)
        for name in added:
            os.environ.pop(name, None)


def _report(error: FFSplitError, *, cause: Exception | None = None) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        shown: BaseException | None = cause or error
        seen: set[int] = set()
        while shown is not None and id(shown) not in seen:  # --debug also shows what `from None` hides
            seen.add(id(shown))
            shown.__suppress_context__ = False
            shown = shown.__cause__ or shown.__context__
        streams.note("".join(traceback.format_exception(cause or error)).rstrip())
    streams.note(f"ffsplit: {error}")


def checked_output(code: int, *, is_result: bool) -> int:
    """The exit code. Raises FFSplitError if the command succeeded, but its result did not reach stdout."""
    if (lost := streams.lost_output()) is not None:
        if is_result and code == DONE:
            raise FFSplitError(f"the result could not be written to stdout: {lost}")
        streams.note(f"ffsplit: the output on stdout is incomplete: {lost}")
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, with its cleanup."""

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not stop the cleanup
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
