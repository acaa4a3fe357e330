"""What whoever waits for a run sees of it: bars on a terminal, and lines for people or programs elsewhere."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ffsplit import logs, progress
from ffsplit.api import calibrate, compress
from ffsplit.cli import main
from ffsplit.progress import Expected, Progress, Share, StageLog
from ffsplit.run.job import prepare
from ffsplit.run.pipeline import expected_stages
from ffsplit.store.beacon import Beacon
from ffsplit.store.scratch import Result, Scratch
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


def test_stages_are_numbered_and_the_time_left_in_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later stages are scaled by what earlier ones took of their estimates."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    stages = [Expected("calibrate", 5), Expected("skipped", 100), Expected("fit", 10), Expected("measure", 7)]
    stream, shown = io.StringIO(), None
    shown = Progress(stream)
    shown.expect(stages)
    shown.start("calibrate", 1)
    now += 10
    shown.advance()
    shown.start("fit", 4)
    now += 10
    shown.advance()
    shown.advance()
    shown.start("unforeseen", 1)
    now += 1
    shown.advance()
    shown.start("measure", 1)
    now += 1
    shown.advance()
    assert stream.getvalue().splitlines() == [
        "stage 1 of 4, calibrate: 1/1, 10 s elapsed, about 0 s left, 134 s in all",
        "stage 3 of 4, fit: 1/4, 10 s elapsed, about 30 s left, 42 s in all",
        "stage 3 of 4, fit: 2/4, 10 s elapsed, about 10 s left, 19 s in all",
        "stage 3 of 4, unforeseen: 1/1, 1 s elapsed, about 0 s left",
        "stage 4 of 4, measure: 1/1, 1 s elapsed, about 0 s left, 0 s in all",
    ]


def result(name: str, *, reused: bool = False, **facts: int) -> Result:
    return Result(name=name, files=(), facts=dict(facts), reused=reused)


def test_what_is_computed_per_second_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens where a result counts them, else items by their name. What was reused does not count."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 3.0)
    shards = [result("a", num_tokens=9000, reused=True), *(result(each, num_tokens=6000) for each in "bc")]

    def answers(results: list[Result]) -> Iterator[tuple[int, Result]]:
        nonlocal now
        for index, each in enumerate(results):
            now += 2
            yield index, each

    stream = io.StringIO()
    log = StageLog(Progress(stream), Share(cpus=1, gpus=0, num_workers=lambda: 1))
    log.collect("calibrate", "key", 3, answers(shards))
    log.collect("compress", "key", 4, answers([result(each) for each in "abcd"]), unit="layers")
    assert stream.getvalue().splitlines() == [
        "calibrate: 2/3, 4 s elapsed, about 2 s left, 1,500 tokens/s",
        "calibrate: 3/3, 6 s elapsed, about 0 s left, 2,000 tokens/s",
        "compress: 2/4, 4 s elapsed, about 4 s left, 0.5 layers/s",
        "compress: 4/4, 8 s elapsed, about 0 s left, 0.5 layers/s",
    ]


def test_a_bar_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that it may show, down to the rate; the bar itself gives way."""
    for name, value in {"TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    terminal = Terminal()
    shown = Progress(terminal)
    shown.expect([Expected("calibrate", 10), Expected("heal", 2000)])
    shown.start("calibrate", 900)
    now += 100
    for _ in range(120):
        shown.advance(40_000, "tokens")
    assert shown._bars is not None
    shown._bars.console.print(shown._bars)
    line = terminal.getvalue().splitlines()[-1]
    text = re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()
    assert len(text) <= 80 and "120/900" in text
    assert re.search(r"calibrate .*━.*, \d+:\d\d left, [\d:]+ in all, 48,000 tokens/s$", text), text


def test_the_overhead_of_a_tiny_stage_does_not_scale_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that took 5 s instead of 30 ms does not turn the next from 1.6 s into minutes."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    shown = Progress(stream)
    shown.expect([Expected("calibrate", 0.03), Expected("measure", 1.6)])
    shown.start("calibrate", 1)
    now += 5
    shown.advance()
    assert stream.getvalue() == "stage 1 of 2, calibrate: 1/1, 5 s elapsed, about 0 s left, 2 s in all\n"


def test_nothing_is_told_in_all_where_an_estimate_is_missing() -> None:
    stream = io.StringIO()
    shown = Progress(stream)
    shown.expect([Expected("calibrate", 5), Expected("measure", None)])
    shown.start("calibrate", 1)
    shown.advance()
    assert stream.getvalue() == "stage 1 of 2, calibrate: 1/1, 0 s elapsed, about 0 s left\n"


def test_programs_have_the_number_and_both_times(capsys: pytest.CaptureFixture[str]) -> None:
    logs.ask_for("json")
    shown = Progress(io.StringIO())
    shown.expect([Expected("calibrate", 5), Expected("measure", 5)])
    shown.start("calibrate", 1)
    shown.advance()
    (line,) = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (line["number"], line["num_stages"]) == (1, 2)
    assert line["seconds_left"] == 0 and line["seconds_left_in_all"] >= 0


def test_a_terminal_has_the_number_and_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress(stream) as shown:
        shown.expect([Expected("calibrate", 5), Expected("measure", 5)])
        shown.start("calibrate", 2)
        shown.advance()
        assert seen_within(5.0, lambda: "left," in stream.getvalue())
        shown.advance()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    assert any("1/2 calibrate" in line and "left," in line and "in all" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert "1/2 calibrate" in lines[-1] and "left" not in lines[-1]


def test_work_without_parts_spins_on_a_terminal_and_leaves_no_trace_in_a_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, log = Terminal(), io.StringIO()
    with Progress(stream) as shown, shown.working("reading the model"):
        assert seen_within(5.0, lambda: len(set(re.findall("[\u2800-\u28ff]", stream.getvalue()))) >= 2)
    assert "reading the model" in stream.getvalue()
    with Progress(log) as shown:
        with shown.working("reading the model"):
            pass
        shown.start("calibrate", 1)
        shown.advance()
    assert log.getvalue() == "calibrate: 1/1, 0 s elapsed, about 0 s left\n"


HEAL = "healing: {epochs: 1, batch_rows: 8, learning_rate: .002, evaluations: 1, checkpoint_minutes: 0}"
LAST = "after_healing: {kind: quantize, num_bits: 8, group_size: null}"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["calibrate", "compress", "measure"]),
        ({"shard_size": 1}, ["calibrate", "reduce", "compress", "measure"]),
        ({"allocation": "search"}, ["calibrate", "allocate", "compress", "measure"]),
        (
            {"more": f"refits: [{{num_steps: 2}}]\n{HEAL}\n{LAST}"},
            ["calibrate", "compress", "sample", "refit", "heal", "quantize", "measure"],
        ),
    ],
    ids=["fast", "many shards", "search", "every stage"],
)
def test_the_stages_of_a_run_are_known_before_it(
    options: dict[str, Any], names: list[str], small_job: SmallJob, tmp_path: Path
) -> None:
    config = small_job.config(tmp_path / "out", recipe=small_job.recipe(**options))
    expected = expected_stages(prepare(config))
    assert [each.stage for each in expected] == names
    assert all(each.seconds is not None for each in expected)
    assert [stage.name for stage in compress(config).stages] == names


def test_a_run_with_statistics_samples_instead_of_calibrating(small_job: SmallJob, tmp_path: Path) -> None:
    statistics = small_job.config(tmp_path / "statistics")
    assert [each.stage for each in expected_stages(prepare(statistics, kind="statistics"))] == ["calibrate"]
    assert [stage.name for stage in calibrate(statistics).stages] == ["calibrate"]
    config = small_job.config(tmp_path / "out", stats=str(tmp_path / "statistics"))
    names = [each.stage for each in expected_stages(prepare(config))]
    assert [stage.name for stage in compress(config).stages] == names == ["sample", "compress", "measure"]


def seen_within(seconds: float, condition: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.01)
    return False
