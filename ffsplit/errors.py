"""Every error a user can meet, one tree. Each takes one message, so that it pickles through Ray."""


class FFSplitError(Exception):
    """Base of all errors raised on purpose. The message says what, where and how to mend it."""


class ConfigError(FFSplitError):
    """A flag, a recipe or an input file is wrong: the user's to mend."""


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
