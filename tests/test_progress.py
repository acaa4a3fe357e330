"""What whoever waits for a run sees of it: bars on a terminal, and lines for people or programs elsewhere."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ffsplit import logs, progress
from ffsplit.cli import main
from ffsplit.progress import Progress
from ffsplit.store.beacon import Beacon
from ffsplit.store.scratch import Scratch
from tests.small_jobs import SmallJob


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines for programs are asked for in one test alone."""
    monkeypatch.setenv(logs.VARIABLE, "text")
    monkeypatch.setattr(logs._logger, "handlers", [])
    monkeypatch.setattr(logs._logger, "propagate", True)
    monkeypatch.setattr(logs._logger, "level", logging.NOTSET)


def shown_on(stream: io.StringIO) -> str:
    with Progress(stream) as shown:
        shown.start("calibrate", 3)
        shown.advance()
        shown.note("a note with [brackets]")
        shown.advance()
        shown.advance()
    return stream.getvalue()


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown_on(Terminal())
    assert "calibrate" in text and "3/3" in text and "\x1b[" in text
    assert "a note with [brackets]" in text
    assert "s elapsed" not in text


def test_a_log_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last item has one in any case, the others where it took long since the one before."""
    assert shown_on(io.StringIO()).splitlines() == [
        "a note with [brackets]",
        "calibrate: 3/3, 0 s elapsed, about 0 s left",
    ]
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert "calibrate: 1/3, 0 s elapsed, about 0 s left" in shown_on(io.StringIO())


def test_programs_have_json_even_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.ask_for("json")
    assert shown_on(Terminal()) == ""
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["note", "progress"]
    assert lines[0]["message"] == "a note with [brackets]"
    assert (lines[1]["stage"], lines[1]["done"], lines[1]["total"]) == ("calibrate", 3, 3)


def test_the_flag_asks_for_json(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--log-format", "json")
    capsys.readouterr()
    assert main(["compress", *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"note", "progress", "stage done", "publishing"} <= {line["event"] for line in lines}
    assert len({line["run"] for line in lines if line["event"] == "publishing"}) == 1


def test_a_long_task_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file in the scratch, which the driver reads: lines in a log, and the bar of a terminal."""
    for name in ("LINE_EVERY_S", "LOOK_EVERY_S", "BEAT_S"):
        monkeypatch.setattr(progress, name, 0.01)
    monkeypatch.setenv("TERM", "xterm")
    beacon = Beacon(scratch=Scratch.of(str(tmp_path), "key"), name="heal")
    assert beacon.read() is None
    for stream, expected in ((io.StringIO(), "heal: 9,000 tokens per second, 3/12, "), (Terminal(), "3/12")):
        with Progress(stream) as shown:
            shown.start("heal", 1, beacon=beacon)
            beacon.teller(every_s=0)(3, 12, "9,000 tokens per second")
            assert seen_within(5.0, lambda stream=stream, text=expected: text in stream.getvalue())
            shown.advance()
        assert "heal: 1/1" in stream.getvalue() or "1/1" in stream.getvalue()
    assert json.loads((tmp_path / ".scratch/key/position/heal.json").read_text())["done"] == 3


def test_a_worker_tells_seldom_and_never_fails(tmp_path: Path) -> None:
    beacon = Beacon(scratch=Scratch.of(str(tmp_path), "key"), name="heal")
    beacon.teller()(1, 2, "just begun")
    assert beacon.read() is None
    (tmp_path / "file").write_text("no directory")
    broken = Beacon(scratch=Scratch.of(str(tmp_path / "file"), "key"), name="heal")
    broken.teller(every_s=0)(1, 2, "")
    assert broken.read() is None


def test_a_log_is_never_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_S", 0.05)
    monkeypatch.setattr(progress, "BEAT_S", 0.01)
    stream = io.StringIO()
    with Progress(stream) as shown:
        shown.start("calibrate", 3)
        assert seen_within(5.0, lambda: stream.getvalue().count("calibrate: 0/3, 0 s elapsed\n") >= 2)


def seen_within(seconds: float, condition: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.01)
    return False
