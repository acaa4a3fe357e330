"""Progress of a transfer: a bar on a terminal, lines elsewhere, none of it on stdout."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import pytest

from ffsplit import progress
from ffsplit.progress import bytes_to_stderr


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with bytes_to_stderr("pull") as show:
            show(1_000_000, 4_000_000)
            show(3_000_000, 4_000_000)
        shown = _read_all(ours)
    os.close(ours)
    assert "pull" in shown and "3.0/4.0 MB" in shown
    assert capsys.readouterr().out == ""


def test_what_fails_before_the_first_byte_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with suppress(ValueError), bytes_to_stderr("pull"):
            raise ValueError
        shown = _read_all(ours)
    os.close(ours)
    assert shown == ""


def _read_all(terminal: int) -> str:
    """What was written to a terminal, which gives it in pieces."""
    os.set_blocking(terminal, False)
    pieces = []
    with suppress(BlockingIOError):
        while piece := os.read(terminal, 1 << 16):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter((0.0, 1.0, 12.0, 13.0, 25.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with bytes_to_stderr("pull") as show:
        for done in (1, 2000, 3000, 4000):
            show(done, 4000)
    captured = capsys.readouterr()
    assert captured.err == "pull: 2,000 of 4,000 bytes\npull: 4,000 of 4,000 bytes\n"
    assert captured.out == ""
