"""Aliases: atomic moves with a history, resolved wherever a place is given, and never collected."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.errors import ArtifactError, ConfigError, StoreError
from ffsplit.models.fetch import locate_model
from ffsplit.store import aliases as module
from ffsplit.store import publish as publishing
from ffsplit.store.aliases import (
    AliasMoved,
    aliased_runs,
    aliases,
    history,
    promote,
    read_alias,
    remove_alias,
    split_alias,
)
from ffsplit.store.artifact import locate, open_statistics
from ffsplit.store.commits import list_runs, read_commit
from ffsplit.store.gc import collect, pin, plan
from ffsplit.store.pull import materialize, pull, verify
from ffsplit.store.store import Store, open_store

from .attempts import ATTEMPT, publish

RUNS = [f"{number:016x}" for number in range(4)]


@pytest.fixture
def filled(store: Store, tmp_path: Path) -> Store:
    for run_key in RUNS:
        publish(store, tmp_path / run_key, run_key=run_key)
    return store


def move(store: Store, run_key: str, **options: object) -> None:
    commit = read_commit(store, run_key)
    assert commit is not None
    promote(store, commit, alias="production", **options)  # type: ignore[arg-type]


def test_an_alias_names_a_run_wherever_a_place_is_given(filled: Store, tmp_path: Path) -> None:
    place = f"{filled.uri}@production"
    with pytest.raises(ConfigError, match=r"has no alias 'production': `ffsplit promote .* --as production`"):
        locate(place)
    move(filled, RUNS[1])
    assert locate(place).uri == f"{filled.uri}/{RUNS[1]}/{ATTEMPT}"
    assert locate(filled.uri).run_key == RUNS[-1]
    assert verify(place).location == f"{filled.uri}/{RUNS[1]}/{ATTEMPT}" and verify(place).ok
    assert json.loads((materialize(place) / "manifest.json").read_text())["run_key"] == RUNS[1]
    assert (locate_model(place).directory / "config.json").read_bytes() == b"{}"
    with pytest.raises(ConfigError, match="holds no neuron statistics"):
        open_statistics(place)
    copy = pull(place, tmp_path / "copy")
    assert json.loads((copy / "manifest.json").read_text())["run_key"] == RUNS[1]
    with pytest.raises(ConfigError, match="has no alias 'produktion', did you mean 'production'"):
        locate(f"{filled.uri}@produktion")
    with pytest.raises(ConfigError, match="has no alias 'xyz'; it has production"):
        pull(f"{filled.uri}@xyz")


def test_every_change_is_in_the_history(filled: Store) -> None:
    move(filled, RUNS[0], by="anna@build")
    move(filled, RUNS[2], by="batch 1")
    move(filled, RUNS[2])  # names it already: nothing changes
    remove_alias(filled, "production")
    assert aliases(filled) == {}
    with pytest.raises(ConfigError, match="has no alias 'production'"):
        remove_alias(filled, "production")
    move(filled, RUNS[1])
    changes = history(filled, "production")
    assert [(each.number, each.from_run, each.run_key) for each in changes] == [
        (1, None, RUNS[0]),
        (2, RUNS[0], RUNS[2]),
        (3, RUNS[2], None),
        (4, None, RUNS[1]),
    ]
    assert [each.changed_by for each in changes[:2]] == ["anna@build", "batch 1"]
    assert re.fullmatch(r".+@.+", changes[3].changed_by)
    assert aliased_runs(filled) == {RUNS[1]}


def test_of_many_writers_at_once_each_makes_its_own_change(filled: Store) -> None:
    """No change is lost, and the history is one chain."""

    def once(number: int) -> bool:
        store = open_store(filled.uri)
        try:
            move(store, RUNS[number % 4], by=f"writer {number}")
        except AliasMoved:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(once, range(6)))
    changes = history(filled, "production")
    assert [each.number for each in changes] == list(range(1, len(changes) + 1))
    assert [each.from_run for each in changes[1:]] == [each.run_key for each in changes[:-1]]
    assert 1 <= len(changes) <= sum(told)
    assert len({each.changed_by for each in changes}) == len(changes)


def test_an_alias_that_moved_since_it_was_looked_at_is_left_alone(filled: Store) -> None:
    move(filled, RUNS[0])
    seen = read_alias(filled, "production")
    move(filled, RUNS[1], by="anna@build")
    with pytest.raises(AliasMoved, match="production was moved by anna@build meanwhile: compare again"):
        move(filled, RUNS[2], over=seen)
    move(filled, RUNS[2], over=read_alias(filled, "production"))
    assert aliased_runs(filled) == {RUNS[2]}


def test_gc_keeps_what_an_alias_names_also_when_it_is_made_meanwhile(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(filled, RUNS[0])
    planned = plan(filled, keep_last=0, min_age=timedelta(0))
    assert planned.kept == (RUNS[0], RUNS[3])
    move(filled, RUNS[1])
    delete = type(filled).delete

    def promoted_as_the_commit_goes(store: Store, key: str) -> None:
        if key == f"{RUNS[2]}/commit.json":
            commit = read_commit(store, RUNS[2])
            assert commit is not None
            promote(store, commit, alias="staging")
        delete(store, key)  # type: ignore[arg-type]

    monkeypatch.setattr(type(filled), "delete", promoted_as_the_commit_goes)
    assert collect(filled, planned) == []
    assert [run.commit.run_key for run in list_runs(filled)] == RUNS
    assert verify(f"{filled.uri}@staging").ok
    monkeypatch.undo()
    collect(filled, plan(filled, keep_last=0, min_age=timedelta(0)))
    assert [run.commit.run_key for run in list_runs(filled)] == RUNS[1:]


def test_a_run_that_gc_removes_first_is_not_promoted(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    move(filled, RUNS[1])
    commit = read_commit(filled, RUNS[0])
    assert commit is not None
    filled.delete(f"{RUNS[0]}/commit.json")
    with pytest.raises(StoreError, match=f"{RUNS[0]} was removed meanwhile: promote another run"):
        promote(filled, commit, alias="production")
    assert aliased_runs(filled) == {RUNS[1]}


def test_bad_names_and_records_are_told(filled: Store, tmp_path: Path) -> None:
    commit = read_commit(filled, RUNS[0])
    assert commit is not None
    for name in ("Production", "", "a/b", "../x", "0a", "a" * 64, "prod uction"):
        with pytest.raises(ConfigError, match="is not a valid alias: begin with a lower-case letter"):
            promote(filled, commit, alias=name)
    with pytest.raises(ConfigError, match="'latest' always names the newest model"):
        promote(filled, commit, alias="latest")
    statistics = publish(filled, tmp_path / "statistics", run_key="f" * 16, kind="statistics")
    with pytest.raises(ConfigError, match="holds statistics: an alias names a model"):
        promote(filled, statistics, alias="production")
    filled.put_bytes("aliases/production/00000001.json", b"{}")
    with pytest.raises(ArtifactError, match=r"aliases/production/00000001.json: alias: Field required"):
        locate(f"{filled.uri}@production")


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("out/x@production", ("out/x", "production")),
        ("s3://bucket/a/b@production", ("s3://bucket/a/b", "production")),
        ("s3://bucket/@production", ("s3://bucket", "production")),
        ("file:///a@b@production", ("file:///a@b", "production")),
        ("s3://key:secret@bucket", None),
        ("S3://key@bucket", None),
        ("out/x@Production", None),
        ("a@b/c", None),
        ("out/x", None),
    ],
)
def test_what_is_an_alias_of_a_place(place: str, parts: tuple[str, str] | None) -> None:
    assert split_alias(place) == parts


def test_a_directory_with_such_a_name_is_itself(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "zoo@production"))
    publish(store, tmp_path / "files", run_key=RUNS[0])
    assert locate(f"{tmp_path}/zoo@production").run_key == RUNS[0]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "store")
    store = open_store(uri)
    for run_key in RUNS[:2]:
        publish(store, tmp_path / run_key, run_key=run_key)
    pin(locate(f"{uri}/{RUNS[0]}"))

    def said(*arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        return "".join(capsys.readouterr())

    assert said("promote", f"{uri}/{RUNS[0]}", "--as", "production") == (
        f"{uri}@production names run {RUNS[0]}\n"
    )
    assert said("promote", f"{uri}@production", "--as", "staging") == f"{uri}@staging names run {RUNS[0]}\n"
    assert said("promote", uri, "--as", "production") == (
        f"{uri}@production names run {RUNS[1]} (before: {RUNS[0]})\n"
    )
    lines = said("list", uri).splitlines()
    assert lines[2].endswith("latest,@production") and lines[3].endswith("@staging,pinned")
    rows = json.loads(said("list", uri, "--json"))
    assert [row["aliases"] for row in rows] == [["production"], ["staging"]]
    lines = said("list", f"{uri}@production").splitlines()
    assert re.fullmatch(rf" +2  \d{{4}}-.* {RUNS[1]}  from {RUNS[0]}  \S+@\S+", lines[0])
    assert re.fullmatch(rf" +1  \d{{4}}-.* {RUNS[0]}  from nothing +\S+@\S+", lines[1])
    assert json.loads(said("list", f"{uri}@production", "--json"))[0]["from_run"] == RUNS[0]
    wrong = said("promote", f"{uri}/{RUNS[0]}", "--as", "production", "--remove", code=2)
    assert wrong == f"ffsplit: {uri}@production names run {RUNS[1]}, not {RUNS[0]}\n"
    done = said("promote", uri, "--as", "production", "--remove")
    assert done == f"{uri}@production is removed (before: {RUNS[1]}); its history stays\n"
    assert "has no alias 'production'; it has staging" in said("pull", f"{uri}@production", code=2)
    assert "1" in said("list", f"{uri}@production")
    assert "has no alias 'other'; it has staging" in said("list", f"{uri}@other", code=2)
    assert "names nothing" not in said("promote", f"{tmp_path}/none", "--as", "production", code=2)


def test_a_clock_that_goes_back_changes_no_history(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the changes is that of their numbers, whatever their times are."""
    move(filled, RUNS[0])
    monkeypatch.setattr(module, "datetime", clock_at(datetime(2001, 1, 1, tzinfo=timezone.utc)))
    move(filled, RUNS[1])
    found = history(filled, "production")
    assert [change.run_key for change in found] == RUNS[:2] and found[1].from_run == RUNS[0]
    assert found[1].changed_at < found[0].changed_at
    assert locate(f"{filled.uri}@production").run_key == RUNS[1]


def test_a_clock_that_goes_back_makes_no_new_model_old(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`latest` names the model that was committed last."""
    first = publish(store, tmp_path / "first", run_key=RUNS[1])
    monkeypatch.setattr(publishing, "datetime", clock_at(datetime(2001, 1, 1, tzinfo=timezone.utc)))
    second = publish(store, tmp_path / "second", run_key=RUNS[0])
    assert first.order < second.order
    assert locate(store.uri).run_key == RUNS[0]
    assert [run.commit.run_key for run in list_runs(store)] == [RUNS[1], RUNS[0]]
    assert open_store(store.uri).get_bytes("latest.json").count(RUNS[0].encode()) == 1


def clock_at(moment: datetime) -> type[datetime]:
    """A clock that stands still."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return moment.astimezone(tz)

    return Clock
