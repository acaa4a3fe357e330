"""The user's home directory, and what to do where there is none, as in a container with a uid of its own."""

from __future__ import annotations

import getpass
import os
import secrets
from contextlib import suppress
from pathlib import Path

from ffsplit.errors import ConfigError, FFSplitError

LENT = "ffsplit-no-home"
"""The name of the folder that libraries get as HOME. It is removed when the process ends."""


def home_directory() -> Path | None:
    """The user's home directory, or None if the system has none for this user."""
    with suppress(RuntimeError):  # no HOME, and no entry for this uid
        home = Path.home()
        return home if home.is_absolute() and home.name != LENT else None
    return None


def user_path(text: str | Path) -> Path:
    """Expand ~ in a path. Raises ConfigError for ~ if the user has no home directory."""
    path = Path(text)
    if not path.parts or not path.parts[0].startswith("~"):
        return path
    if path.parts[0] == "~" and home_directory() is None:
        raise ConfigError(f"{text}: this user has no home directory: set HOME, or give the path in full")
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: ~name is an ordinary file name
        return path


def lend_ray_token() -> None:
    """Make a token for a local Ray cluster if Ray cannot store one in the home directory."""
    if not _is_writable(Path(os.environ.get("HOME", ""))) and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _is_writable(home: Path | None) -> bool:
    return home is not None and os.access(home, os.W_OK | os.X_OK)


def settle_home() -> None:
    """Set HOME to a temporary folder if the user has no home directory, or cannot write to it.

    Ray, matplotlib and others store files there. A writable home is left as it is. The directory of
    temporary files is checked likewise.
    """
    from ffsplit.temporary import process_folder, settle_temporary

    settle_temporary()
    home, given = home_directory(), Path(os.environ.get("HOME", ""))
    if _is_writable(home) or (given.name == LENT and given.is_dir()):  # lent by the process above
        return
    with suppress(OSError, FFSplitError):  # no temporary directory: reported by whatever needs one
        lent = process_folder() / LENT
        lent.mkdir(exist_ok=True)
        if home is None or not home.is_dir():
            os.environ["HOME"] = str(lent)
        os.environ.setdefault("MPLCONFIGDIR", str(lent / "matplotlib"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
