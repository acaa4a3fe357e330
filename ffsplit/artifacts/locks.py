"""Locks between the processes of one machine: for one at a time, or for many that read.

A lock for one is a file that exists while it is held. A lock that readers share stays where it is: only who
has it alone may remove it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for it as long as need be. Raises OSError when the file cannot be made."""
    descriptor = _acquire(path, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        _release(path, descriptor)


@contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold a lock unless somebody else does; gives whether it is held."""
    descriptor = _acquire(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def share(path: Path) -> int:
    """A descriptor that holds a lock along with other readers, until it is closed or the process ends.

    Waits for whoever has the lock alone. Raises OSError when the file cannot be made.
    """
    descriptor = _acquire(path, fcntl.LOCK_SH)
    assert descriptor is not None
    return descriptor


def _acquire(path: Path, operation: int) -> int | None:
    """A locked descriptor of the file that is at the path now, not of one its last holder removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, operation)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)
