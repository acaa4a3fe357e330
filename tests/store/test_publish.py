"""One winner whoever races, nothing left of losers and of the interrupted, and a hint that mends itself."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ffsplit.errors import ArtifactError, StoreError
from ffsplit.store.commits import Commit, Kind, latest_commit, list_commits, read_commit, record_bytes
from ffsplit.store.entries import ATTEMPT_ID, file_entries
from ffsplit.store.publish import Upload, new_attempt_id
from ffsplit.store.store import Store, open_store

from .attempts import (
    ATTEMPT,
    FILES,
    RUN_KEY,
    contents,
    from_the_future,
    publish,
    publish_directory,
    write_attempt,
)

OTHER_RUN = "fedcba9876543210"
OTHER_ATTEMPT = "ba9876543210"


def hint(store: Store) -> dict[str, Any]:
    return dict(json.loads(store.get_bytes("latest.json")))


def put_commit(store: Store, *, run_key: str, committed_at: str, kind: Kind = "model") -> Commit:
    commit = Commit(
        run_key=run_key, attempt=ATTEMPT, manifest_sha256="0" * 64, kind=kind, committed_at=committed_at
    )
    store.put_bytes(f"{run_key}/commit.json", commit.model_dump_json().encode())
    return commit


def test_attempt_ids_are_new_and_well_formed() -> None:
    ids = {new_attempt_id() for _ in range(100)}
    assert len(ids) == 100 and all(ATTEMPT_ID.fullmatch(name) for name in ids)


def test_everything_is_published_and_committed(store: Store, tmp_path: Path) -> None:
    assert read_commit(store, RUN_KEY) is None
    directory = write_attempt(tmp_path / "attempt")
    calls: list[tuple[int, int]] = []
    commit = publish_directory(store, directory, progress=lambda done, total: calls.append((done, total)))
    prefix = f"{RUN_KEY}/{ATTEMPT}"
    names = [*FILES, "manifest.json"]
    assert set(contents(store)) == {
        *(f"{prefix}/{name}" for name in names),
        f"{RUN_KEY}/commit.json",
        "latest.json",
        "index.json",
    }
    for name in names:
        assert store.get_bytes(f"{prefix}/{name}") == (directory / name).read_bytes()
    assert read_commit(store, RUN_KEY) == commit == latest_commit(store)
    named = {"run_key": RUN_KEY, "attempt": ATTEMPT, "committed_at": commit.committed_at}
    assert hint(store) == named | {"generation": 1, "schema_version": "1.0"}
    total = sum((directory / name).stat().st_size for name in names)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) == len(names) and calls[-1] == (total, total)


def test_the_manifest_goes_last_and_the_commit_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, order = open_store(str(tmp_path / "store")), []
    for method in ("put_file", "put_if_absent", "put_bytes"):
        original = getattr(store, method)

        def record(key: str, value: Any, original: Callable[..., Any] = original) -> Any:
            order.append(key)
            return original(key, value)

        monkeypatch.setattr(store, method, record)
    publish(store, tmp_path / "attempt")
    assert set(order[:3]) == {f"{RUN_KEY}/{ATTEMPT}/{name}" for name in FILES}
    manifest = f"{RUN_KEY}/{ATTEMPT}/manifest.json"
    assert order[3:5] == [manifest, f"{RUN_KEY}/commit.json"]
    assert sorted(order[5:]) == ["index.json", "latest.json"]


def test_files_are_sent_while_the_manifest_is_still_to_be_written(store: Store, tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt")
    text = (directory / "manifest.json").read_text()
    (directory / "manifest.json").unlink()
    sent = threading.Event()
    with Upload(
        store, run_key=RUN_KEY, attempt=ATTEMPT, progress=lambda done, total: done == total and sent.set()
    ) as upload:
        files = upload.add(directory)
        assert files == file_entries(directory) and sent.wait(30)
        assert set(contents(store)) == {f"{RUN_KEY}/{ATTEMPT}/{name}" for name in FILES}
        (directory / "manifest.json").write_text(text)
        commit = upload.commit(directory, kind="model", move_latest=True)
    assert latest_commit(store) == commit
    assert store.exists(f"{RUN_KEY}/{ATTEMPT}/manifest.json")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArtifactError])
def test_an_upload_that_is_given_up_leaves_nothing(
    store: Store, tmp_path: Path, error: type[BaseException]
) -> None:
    directory = write_attempt(tmp_path / "attempt")
    with pytest.raises(error), Upload(store, run_key=RUN_KEY, attempt=ATTEMPT) as upload:
        upload.add(directory)
        raise error
    assert contents(store) == {} and store.list_directories("") == []


def test_a_digest_that_is_not_the_files_is_named(store: Store, tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt")
    (directory / "model.safetensors").write_bytes(b"heights" * 1000)
    with pytest.raises(ArtifactError, match=r"does not match its manifest: model\.safetensors$"):
        publish_directory(store, directory)
    assert contents(store) == {} and store.list_directories("") == []


def test_a_run_that_is_committed_keeps_its_winner(store: Store, tmp_path: Path) -> None:
    winner = publish(store, tmp_path / "one")
    before = contents(store)
    assert publish(store, tmp_path / "two", attempt=OTHER_ATTEMPT) == winner
    assert publish(store, tmp_path / "one") == winner
    assert contents(store) == before


def test_losing_at_the_last_moment_leaves_only_the_winner(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_if_absent, before = store.put_if_absent, {}

    def be_late(key: str, data: bytes) -> bool:
        monkeypatch.setattr(store, "put_if_absent", put_if_absent)
        publish(store, tmp_path / "winner", attempt=OTHER_ATTEMPT)
        before.update({key: value for key, value in contents(store).items() if f"/{ATTEMPT}/" not in key})
        return put_if_absent(key, data)

    monkeypatch.setattr(store, "put_if_absent", be_late)
    assert publish(store, tmp_path / "loser").attempt == OTHER_ATTEMPT
    assert contents(store) == before and before


def test_eight_threads_racing_have_one_winner_and_leave_nothing_else(tmp_path: Path) -> None:
    root, start = tmp_path / "store", threading.Barrier(8)
    attempts = [new_attempt_id() for _ in range(8)]
    for attempt in attempts:
        write_attempt(tmp_path / attempt, attempt=attempt)

    def race(attempt: str) -> Commit:
        store = open_store(str(root))
        start.wait()
        return publish_directory(store, tmp_path / attempt, attempt=attempt)

    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(race, attempts))
    assert all(commit == commits[0] for commit in commits)
    store = open_store(str(root))
    assert read_commit(store, RUN_KEY) == commits[0]
    assert store.list_directories(RUN_KEY) == [commits[0].attempt]
    assert {path.name for path in root.iterdir()} == {RUN_KEY, "latest.json", "index.json", "latest"}
    assert hint(store)["attempt"] == commits[0].attempt


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreError("full"), MemoryError()], ids=repr)
@pytest.mark.parametrize("method", ["put_file", "put_if_absent"])
def test_an_interrupted_publish_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    original, calls = getattr(store, method), []

    def strike(key: str, value: Any) -> Any:
        calls.append(key)
        if method == "put_if_absent" or len(calls) == 3:
            raise error
        return original(key, value)

    monkeypatch.setattr(store, method, strike)
    with pytest.raises(type(error)):
        publish(store, tmp_path / "attempt")
    assert calls and contents(store) == {}
    assert store.list_directories("") == []


def test_an_interruption_after_the_commit_landed_keeps_the_artifact(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_if_absent = store.put_if_absent

    def land_then_strike(key: str, data: bytes) -> bool:
        put_if_absent(key, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "put_if_absent", land_then_strike)
    with pytest.raises(KeyboardInterrupt):
        publish(store, tmp_path / "attempt")
    commit = latest_commit(store)
    assert commit and commit.attempt == ATTEMPT
    assert store.exists(f"{RUN_KEY}/{ATTEMPT}/manifest.json")


def test_a_commit_that_is_not_there_after_it_was_written_is_no_success(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "put_if_absent", lambda key, data: True)
    with pytest.raises(StoreError, match=r"commit\.json was written but is missing: publish again"):
        publish(store, tmp_path / "attempt")
    assert contents(store) == {}


def test_an_outcome_that_cannot_be_learnt_keeps_the_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_if_absent = store.put_if_absent

    def land_then_vanish(key: str, data: bytes) -> bool:
        def refuse(key: str) -> bytes:
            raise StoreError("unreachable")

        put_if_absent(key, data)
        monkeypatch.setattr(store, "get_bytes", refuse)
        raise StoreError("unreachable")

    monkeypatch.setattr(store, "put_if_absent", land_then_vanish)
    with pytest.raises(StoreError, match="unreachable"):
        publish(store, tmp_path / "attempt")
    assert store.exists(f"{RUN_KEY}/{ATTEMPT}/manifest.json")


@pytest.mark.parametrize("error", [StoreError("denied"), KeyError("a fault of our own")], ids=repr)
def test_what_goes_wrong_with_the_index_and_the_hint_is_said_and_is_no_failure(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def refuse(key: str, data: bytes) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_bytes", refuse)
        commit = publish(store, tmp_path / "attempt")
    said = sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert len(said) == 2
    for name, line in zip(("index.json", "latest.json"), said, strict=True):
        assert line.startswith(f"warning: {store.uri}/{name} is out of date until its next reader: ")
        assert str(error) in line
    assert not store.exists("latest.json")
    assert latest_commit(store) == commit


def test_an_attempt_that_cannot_be_deleted_is_said(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(prefix: str) -> None:
        raise StoreError("denied")

    directory = write_attempt(tmp_path / "attempt")
    monkeypatch.setattr(store, "delete_prefix", refuse)
    with pytest.raises(ArtifactError), Upload(store, run_key=RUN_KEY, attempt=ATTEMPT) as upload:
        upload.add(directory)
        raise ArtifactError("given up")
    assert f"{RUN_KEY}/{ATTEMPT} stays until ffsplit gc removes it: denied" in caplog.text


def test_a_commit_of_a_later_version_is_read_and_kept(store: Store, tmp_path: Path) -> None:
    commit = publish(store, tmp_path / "attempt")
    later = json.dumps(from_the_future(commit) | {"schema_version": "1.4"}).encode()
    store.put_bytes(f"{RUN_KEY}/commit.json", later)
    read = read_commit(store, RUN_KEY)
    assert read is not None and read.attempt == ATTEMPT
    assert json.loads(record_bytes(read)) == json.loads(later)
    assert latest_commit(store) == read
    store.put_bytes(f"{RUN_KEY}/commit.json", later.replace(b'"1.4"', b'"2.0"'))
    with pytest.raises(ArtifactError, match=f"{RUN_KEY}/commit.json has schema 2; .* upgrade ffsplit$"):
        read_commit(store, RUN_KEY)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"run_key": "x"}', b"\xff", None], ids=repr)
def test_latest_is_mended_when_missing_or_corrupt(store: Store, tmp_path: Path, damage: bytes | None) -> None:
    commit = publish(store, tmp_path / "attempt")
    if damage is None:
        store.delete("latest.json")
    else:
        store.put_bytes("latest.json", damage)
    assert latest_commit(store) == commit
    assert hint(store)["attempt"] == ATTEMPT


def test_latest_is_mended_when_stale(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "old")
    stale = store.get_bytes("latest.json")
    newest = publish(store, tmp_path / "new", run_key=OTHER_RUN, attempt=OTHER_ATTEMPT)
    store.put_bytes("latest.json", stale)
    assert latest_commit(store) == newest
    assert hint(store)["run_key"] == OTHER_RUN


def test_publishing_an_old_run_again_does_not_move_latest_back(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "old")
    publish(store, tmp_path / "new", run_key=OTHER_RUN, attempt=OTHER_ATTEMPT)
    publish(store, tmp_path / "again", attempt=OTHER_ATTEMPT)
    assert hint(store)["run_key"] == OTHER_RUN


def test_statistics_never_move_latest(store: Store, tmp_path: Path) -> None:
    statistics = publish(store, tmp_path / "one", kind="statistics")
    assert latest_commit(store) is None
    assert not store.exists("latest.json")
    model = publish(store, tmp_path / "two", run_key=OTHER_RUN)
    assert latest_commit(store) == model
    later = publish(store, tmp_path / "three", run_key="0" * 16, kind="statistics")
    assert hint(store)["run_key"] == OTHER_RUN
    assert latest_commit(store) == model
    assert list_commits(store) == [statistics, model, later]


def test_the_newest_is_by_time_then_by_run_key(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put_commit(store, run_key="f" * 16, committed_at="2025-01-01T00:00:00.900000+00:00")
    put_commit(store, run_key="1" * 16, committed_at="2025-01-01T00:00:01+00:00")
    tied = put_commit(store, run_key="2" * 16, committed_at="2025-01-01T00:00:01+00:00")
    put_commit(store, run_key="3" * 16, committed_at="2025-01-01T00:00:02+00:00", kind="statistics")
    (tmp_path / "not-a-run").mkdir()
    assert latest_commit(store) == tied


def test_looking_for_the_latest_makes_and_takes_nothing(tmp_path: Path) -> None:
    assert latest_commit(open_store(str(tmp_path / "nowhere"))) is None
    (tmp_path / "latest.json").write_text("somebody else's")
    assert latest_commit(open_store(str(tmp_path))) is None
    assert [path.name for path in tmp_path.iterdir()] == ["latest.json"]
    assert (tmp_path / "latest.json").read_text() == "somebody else's"


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"committed_at": "tomorrow"},
        {"committed_at": "2025-01-01T00:00:00"},
        {"run_key": OTHER_RUN},
        {"attempt": "../../etc"},
    ],
    ids=str,
)
def test_a_commit_that_cannot_be_trusted_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    store = open_store(str(tmp_path))
    commit = put_commit(store, run_key=RUN_KEY, committed_at="2025-01-01T00:00:00+00:00")
    store.put_bytes(f"{RUN_KEY}/commit.json", json.dumps({**commit.model_dump(), **change}).encode())
    with pytest.raises(ArtifactError, match=f"{RUN_KEY}/commit.json") as caught:
        latest_commit(store)
    assert "\n" not in str(caught.value)


def test_a_directory_unlike_its_manifest_is_not_published(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))

    def attempt(directory: Path, **changes: Any) -> None:
        given: dict[str, Any] = {"run_key": RUN_KEY, "attempt": ATTEMPT, "kind": "model", **changes}
        publish_directory(store, directory, **given)

    for change in ({"run_key": OTHER_RUN}, {"attempt": OTHER_ATTEMPT}, {"kind": "statistics"}):
        with pytest.raises(ArtifactError, match=f"the model of {RUN_KEY}/{ATTEMPT}, not the"):
            attempt(write_attempt(tmp_path / "a"), **change)
    (tmp_path / "a" / "config.json").unlink()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"short")
    (tmp_path / "a" / "more").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"its manifest: config\.json, model\.safetensors, more$"):
        attempt(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        attempt(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot read .*/a/manifest\.json: Is a directory"):
        attempt(tmp_path / "a")
    assert contents(store) == {} and store.list_directories("") == []
