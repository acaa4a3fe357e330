"""Locks between the processes of one machine: exclusive, or shared by readers.

The file of an exclusive lock exists while it is held. The file of a shared lock stays: only a process that
holds it exclusively may remove it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ffsplit import streams
from ffsplit.errors import StoreError

LOOK_EVERY_S = 0.1
TELL_AFTER_S = 5.0
GIVE_UP_AFTER_S = 6 * 3600.0
"""Longer than any transfer takes. A lock ends with its process, so a lock held for longer means a hang."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting until it is free.

    Raises OSError if the file cannot be created, StoreError if the wait is too long.
    """
    descriptor = _wait_for(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _release(path, descriptor)


@contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock if it is free; yields whether it is held."""
    descriptor = _try(path, fcntl.LOCK_EX)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def share(path: Path) -> int:
    """A descriptor that holds a shared lock until it is closed or the process ends.

    Waits while another process holds the lock exclusively. Raises OSError if the file cannot be created,
    StoreError if the wait is too long.
    """
    return _wait_for(path, fcntl.LOCK_SH)


def _wait_for(path: Path, operation: int) -> int:
    began, told = time.monotonic(), False
    while (descriptor := _try(path, operation)) is None:
        waited = time.monotonic() - began
        if waited > GIVE_UP_AFTER_S:
            raise StoreError(
                f"{path}: another process has held this lock for {GIVE_UP_AFTER_S:g} s: end that process"
            )
        if waited > TELL_AFTER_S and not told:
            streams.note(f"waiting for another process, which holds {path}")
            told = True
        time.sleep(LOOK_EVERY_S)
    return descriptor


def _try(path: Path, operation: int) -> int | None:
    """A locked descriptor of the file now at the path, not of one that its last holder removed.

    None if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
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
