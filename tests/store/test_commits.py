"""The index: a copy of the commits that mends itself, and costs nothing more as the store grows."""

import json
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli import main
from ffsplit.errors import StoreError
from ffsplit.store.commits import Index, latest_commit, list_runs, read_commit
from ffsplit.store.store import Store, open_store

from .attempts import ATTEMPT, RUN_KEY, from_the_future, publish

OTHER_RUN = "fedcba9876543210"


def keys_of(store: Store) -> list[str]:
    return [run.commit.run_key for run in list_runs(store)]


def index_of(store: Store) -> Index:
    return Index.model_validate_json(store.get_bytes("index.json"))


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b'{"runs": 1}', b"\xff"], ids=repr)
def test_it_is_rebuilt_when_missing_or_corrupt(store: Store, tmp_path: Path, damage: bytes | None) -> None:
    publish(store, tmp_path / "a")
    publish(store, tmp_path / "b", run_key=OTHER_RUN, kind="statistics")
    before = index_of(store)
    store.delete("index.json")
    if damage is not None:
        store.put_bytes("index.json", damage)
    assert keys_of(store) == [RUN_KEY, OTHER_RUN]
    assert index_of(store) == before
    assert before.runs[0].size_bytes == 7008 and before.runs[0].model == "m"


def test_it_is_mended_when_behind_or_ahead(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    behind = store.get_bytes("index.json")
    publish(store, tmp_path / "b", run_key=OTHER_RUN)
    ahead = store.get_bytes("index.json")
    store.put_bytes("index.json", behind)
    assert keys_of(store) == [RUN_KEY, OTHER_RUN]
    assert store.get_bytes("index.json") == ahead
    store.delete_prefix(OTHER_RUN)
    assert keys_of(store) == [RUN_KEY]
    assert store.get_bytes("index.json") == behind


def test_a_run_without_a_commit_is_not_listed(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    store.put_bytes(f"{OTHER_RUN}/{ATTEMPT}/config.json", b"{}")
    assert keys_of(store) == [RUN_KEY]


def test_a_manifest_that_is_not_the_committed_one_tells_nothing(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    store.delete("index.json")
    manifest = store.get_bytes(f"{RUN_KEY}/{ATTEMPT}/manifest.json")
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/manifest.json", manifest.replace(b'"m"', b'"x"'))
    assert [run.model for run in list_runs(store)] == ["?"]
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/manifest.json", manifest)
    assert [run.model for run in list_runs(store)] == ["m"]


def test_an_index_that_lies_does_not_decide_what_is_latest(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    newest = publish(store, tmp_path / "b", run_key=OTHER_RUN)
    index = json.loads(store.get_bytes("index.json"))
    index["runs"][0]["commit"]["committed_at"] = "2999-01-01T00:00:00+00:00"
    store.put_bytes("index.json", json.dumps(index).encode())
    assert latest_commit(store) == newest


def test_a_store_that_cannot_be_written_is_listed_all_the_same(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, tmp_path / "a")
    store.delete("index.json")

    def refuse(key: str, data: bytes) -> None:
        raise StoreError("denied")

    monkeypatch.setattr(store, "put_bytes", refuse)
    assert keys_of(store) == [RUN_KEY]


def test_reads_do_not_grow_with_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    for number in range(12):
        publish(store, tmp_path / "attempt", run_key=f"{number:016x}")
    read, original = [], store.open_stream

    def count(key: str, **options: Any) -> Any:
        read.append(key)
        return original(key, **options)

    monkeypatch.setattr(store, "open_stream", count)
    assert len(list_runs(store)) == 12 and read == ["index.json"]
    read.clear()
    latest = latest_commit(store)
    assert latest and sorted(read) == sorted(["index.json", f"{latest.run_key}/commit.json", "latest.json"])
    assert read_commit(store, latest.run_key) == latest


def test_an_index_of_a_later_version_is_used_and_its_fields_are_kept(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "a")
    later = from_the_future(index_of(store)) | {"schema_version": "1.3"}
    store.put_bytes("index.json", json.dumps(later).encode())
    publish(store, tmp_path / "b", run_key=OTHER_RUN)
    assert keys_of(store) == [RUN_KEY, OTHER_RUN]
    written = json.loads(store.get_bytes("index.json"))
    assert written["runs"][0] == later["runs"][0] and len(written["runs"]) == 2
    assert (written["schema_version"], written["a_later_field"]) == ("1.3", later["a_later_field"])


def test_an_index_of_another_major_version_is_left_alone(store: Store, tmp_path: Path) -> None:
    commit = publish(store, tmp_path / "a")
    for name in ("index.json", "latest.json"):
        store.put_bytes(name, json.dumps({"schema_version": "2.0", "runs": {}}).encode())
    publish(store, tmp_path / "b", run_key=OTHER_RUN, kind="statistics")
    assert keys_of(store) == [RUN_KEY, OTHER_RUN]
    assert latest_commit(store) == commit
    for name in ("index.json", "latest.json"):
        assert json.loads(store.get_bytes(name))["schema_version"] == "2.0"


def test_a_store_that_cannot_be_read_is_not_an_artifact_that_tells_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, tmp_path / "a")
    store.delete("index.json")
    original = store.open_stream

    def fail(key: str, **options: Any) -> Any:
        if key.endswith("manifest.json"):
            raise StoreError("cannot read: 503")
        return original(key, **options)

    monkeypatch.setattr(store, "open_stream", fail)
    with pytest.raises(StoreError, match="503"):
        list_runs(store)


def test_the_command(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", store.uri]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    publish(store, tmp_path / "a")
    publish(store, tmp_path / "b", run_key=OTHER_RUN)
    assert main(["list", store.uri, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run_key"], row["latest"], row["pinned"]) for row in rows] == [
        (OTHER_RUN, True, False),
        (RUN_KEY, False, False),
    ]
    assert rows[0]["size_bytes"] == 7008 and rows[0]["keep"] == 0.5
    assert main(["pin", f"{store.uri}/{RUN_KEY}"]) == 0
    capsys.readouterr()
    assert main(["list", store.uri]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[2].startswith(OTHER_RUN) and printed[2].endswith("latest")
    assert "7.01" in printed[3] and printed[3].endswith("pinned")
