"""Every error a user can meet, in one tree. Each takes one message, so that it pickles through Ray.

A library's errors are turned into one of these at the boundary: `with explained("...")` around the call.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ffsplit.redaction import redacted

LONGEST_REASON = 500
"""The most characters of a library's message that are quoted."""
LESS_MEMORY = "give fewer --workers, or --block-by-block"
_NO_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory", "bad_alloc", "ALLOC_FAILED")
"""What libraries without a type for it say: torch on CPUs and in CUDA's libraries, C++, the system."""


class FFSplitError(Exception):
    """Base of all errors raised on purpose. The message tells what, where and how to fix it.

    It often quotes a library, which may quote a credential: credentials are removed.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class ConfigError(FFSplitError):
    """A flag, a recipe or an input file is wrong, and the user can fix it."""


class RunError(FFSplitError):
    """A run that had begun could not be finished. The command is right, and a retry may help."""


class OutOfMemoryError(FFSplitError):
    """A process, its host or a GPU ran out of memory. The command is right, and may need less of it."""


class UnsupportedModelError(ConfigError):
    """The model's feed-forward networks cannot be found or split."""


class BudgetError(ConfigError):
    """No compression of this recipe meets the budget."""


class CalibrationError(FFSplitError):
    """Statistics could not be collected, or are not usable."""


class StoreError(FFSplitError):
    """A store refused, failed or cannot be reached."""


class ArtifactError(FFSplitError):
    """An artifact is invalid: a file is missing, changed or not listed."""


class GateError(FFSplitError):
    """A run completed, but a gate failed or is undecided because of noise; nothing was published."""


@contextmanager
def explained(what: str, *, kind: type[FFSplitError] = ConfigError, advice: str = "") -> Iterator[None]:
    """Turn any error of a library into one line: `what` failed, the first line of the error, and `advice`.

    FFSplit's own errors pass unchanged. A lack of memory becomes OutOfMemoryError, whatever `kind` is. The
    library's error stays the cause, which --debug shows.
    """
    try:
        yield
    except FFSplitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = reason_of(error, besides=what)
        if is_out_of_memory(error):
            kind, advice = OutOfMemoryError, LESS_MEMORY
        raise kind(f"{what}: {reason.rstrip('.')}; {advice}" if advice else f"{what}: {reason}") from error


def reason_of(error: BaseException, *, besides: str = "") -> str:
    """The first non-empty line of an error, or its type. Omits a file name that `besides` has already."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        named = str(error.filename or "")
        text = error.strerror if not named or named in besides else f"{error.strerror}: {named}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # after "...:" the next line has the problem
    if isinstance(error, LookupError | AssertionError):  # "'text'" alone tells little
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a process, its host or a GPU ran out of memory, by an error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(
            sign.lower() in str(error).lower() for sign in _NO_MEMORY
        ):
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The closest of the known names as the end of a message, or nothing if none is close."""
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked, which is not an Exception in Python."""
    return type(error).__name__ == "PanicException"


@contextmanager
def begun() -> Iterator[None]:
    """From the first write on, turn ConfigError into RunError.

    Credentials may expire, a bucket may vanish, a host may join that cannot see the files. Such code raises
    ConfigError, but the command was right and something has been written.
    """
    try:
        yield
    except ConfigError as error:
        raise RunError(str(error)) from error
