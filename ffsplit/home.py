"""The user's home directory, and what to do where there is none, as in a container with a uid of its own."""

from __future__ import annotations

import getpass
import os
import secrets
from contextlib import suppress
from pathlib import Path

from ffsplit.errors import ConfigError, FFSplitError

LENT = "ffsplit-no-home"
"""The name of the folder that libraries get as HOME; of use until the process ends."""


def home_directory() -> Path | None:
    """The user's home; None where the system knows none."""
    with suppress(RuntimeError):  # no HOME, and no entry for this uid
        home = Path.home()
        return home if home.is_absolute() and home.name != LENT else None
    return None


def user_path(text: str | Path) -> Path:
    """A path as a user writes it. Raises ConfigError for one that begins with ~ where there is no home."""
    path = Path(text)
    if not path.parts or not path.parts[0].startswith("~"):
        return path
    if path.parts[0] == "~" and home_directory() is None:
        raise ConfigError(f"{text}: this user has no home directory: set HOME, or give the path in full")
    try:
        return path.expanduser()
    except RuntimeError:  # ~somebody is a name like any other where there is no such user
        return path


def lend_ray_token() -> None:
    """Make a token for a cluster that is started on the spot, where Ray cannot keep one in the home."""
    if not _is_writable(Path(os.environ.get("HOME", ""))) and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _is_writable(home: Path | None) -> bool:
    return home is not None and os.access(home, os.W_OK | os.X_OK)


def settle_home() -> None:
    """Give libraries what they look for in a home, where there is none or it cannot be written.

    Ray, matplotlib and others keep a file or two there. Nothing changes for whoever has a home. The same
    for temporary files.
    """
    from ffsplit.temporary import process_folder, settle_temporary

    settle_temporary()
    home, given = home_directory(), Path(os.environ.get("HOME", ""))
    if _is_writable(home) or (given.name == LENT and given.is_dir()):  # lent by the process above
        return
    with suppress(OSError, FFSplitError):  # without temporary files: said where one is needed
        lent = process_folder() / LENT
        lent.mkdir(exist_ok=True)
        if home is None or not home.is_dir():
            os.environ["HOME"] = str(lent)
        os.environ.setdefault("MPLCONFIGDIR", str(lent / "matplotlib"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
