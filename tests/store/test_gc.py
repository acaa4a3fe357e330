"""Collecting: only what may go, only when told to, and never what latest or a pin names."""

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli import main
from ffsplit.errors import ConfigError, StoreError
from ffsplit.store.artifact import locate
from ffsplit.store.commits import latest_commit, list_runs
from ffsplit.store.gc import collect, pin, pinned_runs, plan
from ffsplit.store.store import Store, open_store

from .attempts import ATTEMPT, RUN_KEY, contents, publish, write_attempt

RUNS = [f"{number:016x}" for number in range(5)]
NO_AGE = timedelta(0)


@pytest.fixture
def filled(store: Store, tmp_path: Path) -> Store:
    for run_key in RUNS:
        publish(store, tmp_path / run_key, run_key=run_key)
    return store


def left(store: Store) -> list[str]:
    return [run.commit.run_key for run in list_runs(store)]


def test_the_last_stay_and_the_rest_goes_whole(filled: Store) -> None:
    before = contents(filled)
    planned = plan(filled, keep_last=2)
    assert [removal.prefix for removal in planned.removals] == [f"{key}/{ATTEMPT}" for key in RUNS[:3]]
    assert planned.kept == tuple(RUNS[3:]) and planned.removals[0].num_files == 4
    assert contents(filled) == before
    assert collect(filled, planned) == list(planned.removals)
    assert left(filled) == RUNS[3:]
    assert {key.split("/")[0] for key in contents(filled)} == {*RUNS[3:], "index.json", "latest.json"}


def test_latest_and_pins_stay_whatever_is_asked(filled: Store, tmp_path: Path) -> None:
    pin(locate(f"{filled.uri}/{RUNS[1]}"))
    publish(filled, tmp_path / "statistics", run_key="f" * 16, kind="statistics")
    collect(filled, plan(filled, keep_last=0))
    assert left(filled) == [RUNS[1], RUNS[4]]
    latest = latest_commit(filled)
    assert latest and latest.run_key == RUNS[4]


def test_only_what_is_committed_can_be_pinned(tmp_path: Path) -> None:
    write_attempt(tmp_path / "store" / RUN_KEY / ATTEMPT)
    with pytest.raises(ConfigError, match=f"{RUN_KEY}/{ATTEMPT} is not committed: only a committed run"):
        pin(locate(str(tmp_path / "store" / RUN_KEY / ATTEMPT)))
    assert pinned_runs(open_store(str(tmp_path / "store"))) == set()


def test_a_list_that_cannot_be_brought_up_to_date_is_said(
    filled: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was to go is gone by then."""
    planned = plan(filled, keep_last=4)

    def fail(store: Store) -> None:
        raise StoreError("away")

    with monkeypatch.context() as patch:
        patch.setattr("ffsplit.store.gc.list_runs", fail)
        assert collect(filled, planned) == list(planned.removals)
    assert f"warning: {filled.uri}: the list of runs is not up to date: away" in caplog.text
    assert left(filled) == RUNS[1:]


def test_statistics_are_counted_apart(filled: Store, tmp_path: Path) -> None:
    publish(filled, tmp_path / "statistics", run_key="f" * 16, kind="statistics")
    assert plan(filled, keep_last=1).kept == (RUNS[4], "f" * 16)


def test_what_changes_between_plan_and_deed_is_heeded(filled: Store) -> None:
    planned = plan(filled, keep_last=1)
    pin(locate(f"{filled.uri}/{RUNS[0]}"))
    collect(filled, planned)
    assert left(filled) == [RUNS[0], RUNS[4]]


def test_orphans_go_when_they_are_old_enough(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    orphans = [f"{RUN_KEY}/{'0' * 12}/x", f"{'1' * 16}/{ATTEMPT}/x", f".scratch/{'2' * 16}/calibrate/x"]
    strangers = ["notes.txt", "backup/x", f"{'1' * 16}/notes.txt"]
    for key in [*orphans, *strangers]:
        store.put_bytes(key, b"x")
    assert plan(store, keep_last=1).removals == ()
    planned = plan(store, keep_last=1, min_age=NO_AGE)
    assert {removal.prefix for removal in planned.removals} == {
        "/".join(key.split("/")[:2]) for key in orphans
    }
    collect(store, planned)
    assert not set(orphans) & set(store.list(""))
    assert set(strangers) < set(store.list(""))
    assert left(store) == [RUN_KEY]


def test_an_orphan_that_was_committed_meanwhile_stays(store: Store, tmp_path: Path) -> None:
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/config.json", b"{}")
    planned = plan(store, keep_last=0, min_age=NO_AGE)
    assert len(planned.removals) == 1
    publish(store, tmp_path / "a")
    assert collect(store, planned) == []
    assert left(store) == [RUN_KEY]


def test_what_killed_writes_left_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(tmp_path / "store"))
    publish(store, tmp_path / "a")
    leftover = tmp_path / "store" / RUN_KEY / ".ffsplit-0123456789abcdef.tmp"
    leftover.write_bytes(b"half")
    assert store.remove_leftovers(datetime.now(timezone.utc) - timedelta(days=1), dry_run=False) == 0
    os.utime(leftover, (0, 0))
    planned = plan(store, keep_last=1)
    assert planned.num_leftovers == 1 and leftover.exists()
    assert main(["gc", store.uri, "--keep-last", "1"]) == 0
    assert "would remove the leftovers of 1 broken uploads" in capsys.readouterr().out and leftover.exists()
    collect(store, planned)
    assert not leftover.exists()


@pytest.mark.s3
def test_uploads_that_were_never_finished_go(s3_uri: str) -> None:
    store: Any = open_store(s3_uri)
    where = {"Bucket": store._bucket, "Key": store._name("big")}
    store._client.create_multipart_upload(**where)
    now = datetime.now(timezone.utc) + timedelta(seconds=60)
    assert store.remove_leftovers(now, dry_run=True) == 1
    assert store.remove_leftovers(now, dry_run=False) == 1
    assert store.remove_leftovers(now, dry_run=False) == 0


def test_the_commands(filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(filled)
    assert main(["gc", filled.uri, "--keep-last", "2"]) == 0
    printed = capsys.readouterr().out
    assert "would remove" in printed and RUNS[0] in printed and "--delete removes it" in printed
    assert contents(filled) == before
    assert main(["pin", f"{filled.uri}/{RUNS[0]}"]) == 0
    assert main(["gc", filled.uri, "--keep-last", "2", "--delete"]) == 0
    assert left(filled) == [RUNS[0], *RUNS[3:]] and pinned_runs(filled) == {RUNS[0]}
    assert main(["pin", f"{filled.uri}/{RUNS[0]}", "--remove"]) == 0
    assert pinned_runs(filled) == set()
    capsys.readouterr()
    for wrong in (
        ["pin", f"{filled.uri}/{RUNS[0]}", "--remove"],
        ["pin", f"{filled.uri}/{RUNS[1]}"],
        ["gc", filled.uri, "--keep-last", "-1"],
        ["gc", filled.uri, "--keep-last", "2", "--min-age", "soon"],
        ["gc", filled.uri],
    ):
        assert main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
