"""Every error a user can meet, one tree. Each takes one message, so that it pickles through Ray.

What a library raises joins the tree at the boundary to it: `with explained("...")` around the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ffsplit.redaction import redacted

LONGEST_REASON = 500
"""Characters of a library's message that are quoted."""


class FFSplitError(Exception):
    """Base of all errors raised on purpose. The message says what, where and how to mend it.

    A library's words are often part of it, and may quote a credential: those are taken out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class ConfigError(FFSplitError):
    """A flag, a recipe or an input file is wrong: the user's to mend."""


class RunError(FFSplitError):
    """What had begun could not be finished: no mistake in the command, and trying again may help."""


class UnsupportedModelError(ConfigError):
    """The model is not one whose feed-forward networks can be found and split."""


class BudgetError(ConfigError):
    """No compression of this recipe meets the budget."""


class CalibrationError(FFSplitError):
    """Statistics could not be collected, or are not fit to judge neurons by."""


class StoreError(FFSplitError):
    """A store refused, failed or cannot be reached."""


class ArtifactError(FFSplitError):
    """An artifact is not whole: a file is missing, changed or not listed."""


class GateError(FFSplitError):
    """A run finished, but a gate was not met, or noise could decide it: nothing was published."""


@contextmanager
def explained(what: str, *, kind: type[FFSplitError] = ConfigError, advice: str = "") -> Iterator[None]:
    """Turn any error of a library into one line: `what` failed, the first line of the error, and `advice`.

    Our own errors pass as they are: they say more. The library's stays the cause, which --debug shows.
    """
    try:
        yield
    except FFSplitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = reason_of(error, besides=what)
        raise kind(f"{what}: {reason.rstrip('.')}; {advice}" if advice else f"{what}: {reason}") from error


def reason_of(error: BaseException, *, besides: str = "") -> str:
    """The first line of an error that says something, or its type; not a file that `besides` names."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        named = str(error.filename or "")
        text = error.strerror if not named or named in besides else f"{error.strerror}: {named}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # "...:" has what is wrong below it
    if isinstance(error, LookupError | AssertionError):  # "'text'" alone says little
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def _is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust met a bug of its own, which is no Exception in Python."""
    return type(error).__name__ == "PanicException"


@contextmanager
def begun() -> Iterator[None]:
    """What happens from the first write on: what is raised as a mistake before it is a failure here.

    Credentials that expire, a bucket that goes, a host that joins and sees nothing: whatever code says
    ConfigError, nobody's command was wrong, and something has been written.
    """
    try:
        yield
    except ConfigError as error:
        raise RunError(str(error)) from error
