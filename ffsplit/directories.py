"""Local directories: the user's home, temporary folders, and local paths in documents."""

from __future__ import annotations

import atexit
import errno
import fcntl
import getpass
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from ffsplit.errors import ConfigError, FFSplitError

# The user's home directory. It may be missing, as in a container with an arbitrary uid.

LENT = "ffsplit-no-home"
"""The folder that libraries get as HOME if the user has no home. It is removed at exit."""


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
    """Set HOME to a temporary folder if the user has no home directory.

    Ray and others store files there. An existing home is left as it is. The directory of
    temporary files is checked likewise.
    """
    settle_temporary()
    home, given = home_directory(), Path(os.environ.get("HOME", ""))
    if _is_writable(home) or (given.name == LENT and given.is_dir()):  # set by the parent process
        return
    if home is None or not home.is_dir():
        with suppress(OSError, FFSplitError):  # no temporary directory: reported later, where one is needed
            lent = process_folder() / LENT
            lent.mkdir(exist_ok=True)
            os.environ["HOME"] = str(lent)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


PREFIX = "ffsplit-work-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder, removed when this context ends."""
    with tempfile.TemporaryDirectory(dir=process_folder(), ignore_cleanup_errors=True) as name:
        yield Path(name)


def process_folder() -> Path:
    """This process's folder, for files that it needs until it exits."""
    return _folder_of(os.getpid())


def temporary_root() -> Path:
    """The directory of all temporary files. Raises ConfigError if no directory is writable."""
    settle_temporary()
    root = Path(tempfile.gettempdir())
    if not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(
            f"temporary files cannot be written in {root}, nor anywhere else: set TMPDIR to a writable "
            "directory"
        )
    return root


def settle_temporary() -> None:
    """Make `gettempdir` return a path even if no directory is writable: some libraries call it on import."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ.get("TMPDIR") or "/tmp"


def remove_abandoned() -> None:
    """Remove leftovers of this user's killed processes."""
    for folder in temporary_root().glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and (held := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """Turn any library's error about a full disk into one FFSplitError."""
    try:
        yield
    except FFSplitError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
            raise
        raise FFSplitError(
            f"no space left for temporary files in {tempfile.gettempdir()} on host {socket.gethostname()}: "
            "free some space or set TMPDIR; finished work is kept, and the same command resumes from it"
        ) from error


@cache
def _folder_of(pid: int) -> Path:
    """Created on first use. The pid is an argument so that a forked child gets its own."""
    remove_abandoned()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary_root()))
        if _lock(folder) is not None:  # else another process found it before the lock, and removes it
            atexit.register(_remove, folder, pid)
            return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder; None if it is held elsewhere or missing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


# Local paths in documents are reduced to names, so that no path of this machine is published with a model.

_LOCAL = re.compile(r"(?:^|:)(~?/.*)", re.DOTALL)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class _JsonRecord(Protocol):
    def model_dump_json(self) -> str: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Any: ...


AnyRecord = TypeVar("AnyRecord", bound=_JsonRecord)


def by_name(record: AnyRecord, *, given: Iterable[str | None]) -> AnyRecord:
    """A pydantic record in which each local path is reduced to its last name.

    `given` holds paths, or values with a path after a colon, such as `sts:/data/pairs.csv`. Paths inside the
    folder of such a path, or inside the home, working or temporary directory, become relative to that folder.
    Relative paths and URIs of stores are kept.
    """
    paths = {path for each in given if each for path in _paths(each)}
    folders = {path.rpartition("/")[0] + "/" for path in paths}
    folders |= {f"{folder}/" for folder in (home_directory(), Path.cwd(), tempfile.gettempdir()) if folder}
    found = {_in_json(path): _in_json(path.rpartition("/")[2]) for path in paths if path.count("/") == 1}
    found |= {_in_json(folder): "" for folder in folders if folder.strip("/")}
    if not found:
        return record
    longest_first = "|".join(re.escape(path) for path in sorted(found, key=len, reverse=True))
    text = record.model_dump_json()
    named = re.sub(rf"(?<![\w.~/-])(?:{longest_first})", lambda match: found[match[0]], text)
    return record if named == text else cast(AnyRecord, type(record).model_validate_json(named))


def _paths(given: str) -> Iterator[str]:
    """The absolute path in a flag's value: as written, and resolved."""
    given = given.removeprefix("file://")
    match = None if _SCHEME.match(given) else _LOCAL.search(given)
    if match is not None:
        path = "/" + match[1].strip("/") if match[1].startswith("/") else match[1].rstrip("/")
        yield path
        yield os.path.realpath(os.path.expanduser(path))


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
