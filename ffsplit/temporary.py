"""Files of a moment, which go with the process that made them, however it ends.

A process has one folder below TMPDIR, with a lock on it that the system drops when the process is gone.
Whoever ends in order removes the folder itself. A process that was killed cannot; what it left has no
holder, and is removed by the next process of this user that looks: every one that makes a folder, and
every run when it ends. Locks hold across containers, where process ids do not.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ffsplit.errors import ConfigError, FFSplitError

PREFIX = "ffsplit-work-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for as long as this context lasts."""
    with tempfile.TemporaryDirectory(dir=process_folder(), ignore_cleanup_errors=True) as name:
        yield Path(name)


def process_folder() -> Path:
    """The folder of this process, for what is of use until it ends."""
    return _folder_of(os.getpid())


def temporary_root() -> Path:
    """The directory of all temporary files. Raises ConfigError when none can be written."""
    settle_temporary()
    root = Path(tempfile.gettempdir())
    if not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(
            f"temporary files cannot be written in {root}, nor anywhere else: set TMPDIR to a directory that "
            "can be written"
        )
    return root


def settle_temporary() -> None:
    """Let libraries ask for the directory, as some do on import, where none can be written."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ.get("TMPDIR") or "/tmp"


def remove_abandoned() -> None:
    """Remove what this user's processes left behind that were killed."""
    for folder in temporary_root().glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and (held := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """Turn the errors of whichever library met a full disk into one FFSplitError."""
    try:
        yield
    except FFSplitError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
            raise
        raise FFSplitError(
            f"no space left for temporary files in {tempfile.gettempdir()} on host {socket.gethostname()}: "
            "free some or set TMPDIR; what is finished stays, and the same command goes on from there"
        ) from error


@cache
def _folder_of(pid: int) -> Path:
    """Made when first asked for: a child that was forked gets one of its own."""
    remove_abandoned()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary_root()))
        if _lock(folder) is not None:  # else somebody looked between the two, and takes it away
            atexit.register(_remove, folder, pid)
            return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder, None when another process does or it is gone."""
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
