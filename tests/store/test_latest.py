"""`latest` in a directory of runs: always the newest model, whole, and never in anybody's way."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.store.artifact import locate
from ffsplit.store.commits import latest_commit, list_runs
from ffsplit.store.entries import check_outside_attempts
from ffsplit.store.gc import collect, plan
from ffsplit.store.local import LocalStore
from ffsplit.store.manifest import Manifest
from ffsplit.store.pull import materialize, pull, verify
from ffsplit.store.store import Store, open_store

from .attempts import ATTEMPT, RUN_KEY, publish, write_attempt

RUNS = [f"{number:016x}" for number in range(8)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(params=["link", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of file systems: those with symbolic links, and those without."""
    if request.param == "no links":
        forbid_links(monkeypatch)
    return bool(request.param == "link")


def forbid_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted", source, None, target)

    monkeypatch.setattr(os, "symlink", refuse)


def named(root: Path) -> str:
    """The run that `latest` stands for, by its manifest; everything else in it must be there too."""
    manifest = Manifest.from_json((root / "latest" / "manifest.json").read_bytes())
    assert all((root / "latest" / entry.path).is_file() for entry in manifest.files)
    return manifest.run_key


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_it_names_the_newest_model(root: Path, tmp_path: Path, links: bool) -> None:
    store = open_store(str(root))
    for run_key in RUNS[:3]:
        publish(store, tmp_path / run_key, run_key=run_key)
        assert named(root) == run_key
    assert (root / "latest").is_symlink() == links
    if links:
        assert os.readlink(root / "latest") == f"{RUNS[2]}/{ATTEMPT}", "the folder can be moved"
    publish(store, tmp_path / "statistics", run_key="f" * 16, kind="statistics")
    publish(store, tmp_path / "again", run_key=RUNS[0], attempt="9" * 12)
    assert named(root) == RUNS[2] and leftovers(root) == []


def test_without_links_it_takes_no_space(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_links(monkeypatch)
    publish(open_store(str(root)), tmp_path / "a")
    for path in (root / RUN_KEY / ATTEMPT).rglob("*.*"):
        assert path.samefile(root / "latest" / path.relative_to(root / RUN_KEY / ATTEMPT))


def test_a_file_system_may_lose_and_gain_links(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a folder is copied to another disk and back."""
    store = open_store(str(root))
    publish(store, tmp_path / "a", run_key=RUNS[0])
    with monkeypatch.context() as patch:
        forbid_links(patch)
        publish(store, tmp_path / "b", run_key=RUNS[1])
        assert named(root) == RUNS[1] and not (root / "latest").is_symlink()
    publish(store, tmp_path / "c", run_key=RUNS[2])
    assert named(root) == RUNS[2] and (root / "latest").is_symlink()
    assert leftovers(root) == []


@pytest.mark.parametrize("damage", ["missing", "stale", "dangling"])
def test_a_reader_corrects_it(root: Path, tmp_path: Path, damage: str) -> None:
    store = open_store(str(root))
    for run_key in RUNS[:2]:
        publish(store, tmp_path / run_key, run_key=run_key)
    (root / "latest").unlink()
    if damage != "missing":
        (root / "latest").symlink_to(f"{RUNS[0] if damage == 'stale' else '5' * 16}/{ATTEMPT}")
    assert latest_commit(store) is not None and named(root) == RUNS[1]


@pytest.mark.parametrize("kind", ["file", "folder", "copy", "link"])
def test_what_a_user_has_there_stays(
    root: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root.mkdir()
    mine = root / "latest"
    if kind == "file":
        mine.write_text("mine")
    elif kind == "folder":
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
    elif kind == "copy":
        write_attempt(mine)
    else:
        mine.symlink_to(tmp_path)
    store = open_store(str(root))
    commit = publish(store, tmp_path / "a")
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said == f"warning: {mine} was not made by FFSplit: rename it, so that it can name the newest"
    assert latest_commit(store) == commit and verify(str(root)).ok
    assert mine.is_symlink() == (kind == "link") and mine.is_dir() == (kind != "file")
    assert kind != "folder" or [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert kind != "copy" or (mine / "manifest.json").stat().st_nlink == 1


def test_runs_that_end_at_once_leave_the_newest(root: Path, tmp_path: Path) -> None:
    """Meanwhile whoever reads it finds a whole artifact."""
    publish(open_store(str(root)), tmp_path / "first", run_key="f" * 16)
    start, done = threading.Barrier(len(RUNS) + 1), threading.Event()

    def run(run_key: str) -> None:
        store = open_store(str(root))
        start.wait()
        publish(store, tmp_path / run_key, run_key=run_key)
        latest_commit(store)  # the last step of every run

    def read() -> int:
        start.wait()
        found = [named_at(os.path.realpath(root / "latest"))]
        while not done.is_set():
            found.append(named_at(os.path.realpath(root / "latest")))
        return len(found)

    def named_at(place: str) -> str:
        return Manifest.from_json(Path(place, "manifest.json").read_bytes()).run_key

    with ThreadPoolExecutor(len(RUNS) + 1) as pool:
        reading = pool.submit(read)
        for each in [pool.submit(run, run_key) for run_key in RUNS]:
            each.result()
        done.set()
        assert reading.result() > 0
    newest = list_runs(open_store(str(root)))[-1].commit
    assert named(root) == newest.run_key and leftovers(root) == []


def test_a_commit_after_the_listing_is_not_lost(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow run lists the commits, then another commits and points, then the slow one points."""
    store = open_store(str(root))
    publish(store, tmp_path / "a", run_key=RUNS[0])
    (root / "latest").unlink()
    point, other = store.point, open_store(str(root))

    def late(name: str, prefix: str) -> bool:
        if prefix.startswith(RUNS[0]):
            publish(other, tmp_path / "b", run_key=RUNS[1])
        return point(name, prefix)

    monkeypatch.setattr(store, "point", late)
    latest = latest_commit(store)
    assert latest is not None and latest.run_key == RUNS[1] == named(root)


def test_it_names_a_committed_artifact_to_every_command(
    root: Path, tmp_path: Path, links: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(root))
    commit = publish(store, tmp_path / "a")
    place = str(root / "latest")
    assert verify(place).ok and verify(place).num_files == 3
    assert materialize(place).samefile(root / "latest")
    assert (pull(place, tmp_path / "copy") / "config.json").read_bytes() == b"{}"
    if links:
        assert locate(place).commit == commit and locate(place).uri == str(root / RUN_KEY / ATTEMPT)
        assert main(["pin", place]) == 0 and (root / "pins" / f"{RUN_KEY}.json").is_file()
    capsys.readouterr()
    assert main(["list", str(root)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3, "a head, a rule and one run, not two"


def test_collecting_leaves_it(root: Path, tmp_path: Path, links: bool) -> None:
    store = open_store(str(root))
    for run_key in RUNS[:3]:
        publish(store, tmp_path / run_key, run_key=run_key)
    planned = plan(store, keep_last=0, min_age=timedelta(0))
    assert [removal.prefix for removal in planned.removals] == [f"{key}/{ATTEMPT}" for key in RUNS[:2]]
    collect(store, planned)
    assert named(root) == RUNS[2] and verify(str(root)).ok
    assert {path.name for path in root.iterdir()} == {RUNS[2], "index.json", "latest.json", "latest"}


def test_a_killed_swap_is_collected(root: Path, tmp_path: Path) -> None:
    store = open_store(str(root))
    publish(store, tmp_path / "a")
    shutil.copytree(root / RUN_KEY / ATTEMPT, root / f".ffsplit-{'0' * 16}.tmp")
    (root / f".ffsplit-{'1' * 16}.tmp").symlink_to(f"{RUN_KEY}/{ATTEMPT}")
    listed = {key.split("/")[0] for key in store.list("")}
    assert listed == {RUN_KEY, "index.json", "latest.json", "latest"}
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    assert store.remove_leftovers(later, dry_run=True) == 2 == len(leftovers(root))
    assert store.remove_leftovers(later, dry_run=False) == 2 and leftovers(root) == []
    assert named(root) == RUN_KEY


def test_nothing_is_published_or_written_into_it(root: Path, tmp_path: Path, links: bool) -> None:
    publish(open_store(str(root)), tmp_path / "a")
    for path in (root / "latest", root / "latest" / "below", root / RUN_KEY / ATTEMPT / "below"):
        with pytest.raises(ConfigError, match="lies in a published attempt: choose another place"):
            check_outside_attempts(str(path), flag="--out")
    check_outside_attempts(str(tmp_path / "latest" / "out"), flag="--out")


def test_buckets_have_none(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    if isinstance(store, LocalStore):
        assert store.point("latest", f"{RUN_KEY}/{ATTEMPT}") is False, "nothing has changed"
    else:
        assert store.point("latest", f"{RUN_KEY}/{ATTEMPT}") is False
        assert not any(key.split("/")[0] == "latest" for key in store.list(""))
