"""Every error a user can meet, one tree. Each takes one message, so that it pickles through Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FFSplitError(Exception):
    """Base of all errors raised on purpose. The message says what, where and how to mend it."""


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
    """A run finished, but its result did not pass its gates: nothing was published."""


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
