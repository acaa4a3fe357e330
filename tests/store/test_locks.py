"""Locks between processes: one holder at a time, and a wait that is told and has an end."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from ffsplit.errors import StoreError
from ffsplit.store import locks
from ffsplit.store.locks import locked, share, try_locked


def test_a_wait_for_another_process_is_told_and_ends_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "a.lock", threading.Event()
    monkeypatch.setattr(locks, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr("ffsplit.store.locks.streams.note", lambda line: told.set())
    order: list[str] = []

    def second() -> None:
        with locked(path):
            order.append("second")

    waits = threading.Thread(target=second)
    with locked(path):
        waits.start()
        assert told.wait(30)
        order.append("first")
    waits.join(30)
    assert order == ["first", "second"] and not path.exists()


@pytest.mark.parametrize("wait", [lambda path: locked(path).__enter__(), share])
def test_a_wait_that_is_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(locks, "GIVE_UP_AFTER_S", 0.0)
    with (
        locked(tmp_path / "a.lock"),
        pytest.raises(StoreError, match=r"a\.lock: another process has held this lock"),
    ):
        wait(tmp_path / "a.lock")


def test_a_lock_that_is_held_is_not_waited_for_unless_asked(tmp_path: Path) -> None:
    with locked(tmp_path / "a.lock"), try_locked(tmp_path / "a.lock") as held:
        assert not held
    with try_locked(tmp_path / "a.lock") as held:
        assert held


def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays open: who waits tries again and again."""
    tried: list[int] = []

    def refuse(descriptor: int, operation: int) -> None:
        tried.append(descriptor)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks available"), locked(tmp_path / "a.lock"):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tried[0])


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last holder lets go between the opening of the file and the lock on it."""
    path, flock, tried = tmp_path / "a.lock", fcntl.flock, list[int]()

    def late(descriptor: int, operation: int) -> None:
        tried.append(descriptor)
        if len(tried) == 1:
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path), try_locked(path) as second:
        assert len(tried) == 3 and not second
