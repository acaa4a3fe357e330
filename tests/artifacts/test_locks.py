"""Locks between processes: one holder at a time, and a wait that is told and has an end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ffsplit.artifacts import locks
from ffsplit.artifacts.locks import locked, share, try_locked
from ffsplit.errors import StoreError


def test_a_wait_for_another_process_is_told_and_ends_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "a.lock", threading.Event()
    monkeypatch.setattr(locks, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr("ffsplit.artifacts.locks.streams.note", lambda line: told.set())
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
