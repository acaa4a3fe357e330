"""What the drill reads of a run: every line once, whatever becomes of the files."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.events import Events, recomputed


def line(event: str, item: str, *, second: int, stage: str = "calibrate") -> str:
    time = f"2026-01-01T00:00:{second:02d}+00:00"
    return json.dumps({"time": time, "event": event, "stage": stage, "item": item, "pid": "7"}) + "\n"


def test_a_file_that_is_renamed_is_read_on_and_one_that_goes_is_no_error(tmp_path: Path) -> None:
    before, driver = tmp_path / "worker-a-01000000-7.err", tmp_path / "driver.err"
    before.write_text(line("started", "old", second=0))
    events = Events(tmp_path, (driver,))
    with before.open("a") as file:
        file.write(line("started", "one", second=1))
    assert [event.item for event in events.read()] == ["one"]
    after = before.rename(tmp_path / "worker-a-02000000-7.err")
    with after.open("a") as file:
        file.write(line("finished", "one", second=3) + line("started", "two", second=4)[:20])
    driver.write_text("no JSON\n" + line("publishing", "", second=2, stage=""))
    assert [event.name for event in events.read()] == ["started", "publishing", "finished"]
    after.unlink()
    assert len(events.read()) == 3


def test_what_is_begun_again_after_it_was_finished_is_found(tmp_path: Path) -> None:
    file = tmp_path / "worker-a.err"
    events = Events(tmp_path, ())
    lost = line("started", "lost", second=1) + line("started", "lost", second=2)
    done = line("started", "done", second=1) + line("finished", "done", second=2)
    file.write_text(lost + done + line("reused", "done", second=3))
    assert recomputed(events.read()) == []
    with file.open("a") as more:
        more.write(line("started", "done", second=4))
    assert recomputed(events.read()) == ["calibrate/done"]
