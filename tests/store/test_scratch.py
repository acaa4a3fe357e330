"""Finished pieces: found again whole, done again where they are missing or damaged, and nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ffsplit.errors import ConfigError, FFSplitError, StoreError
from ffsplit.store import s3_client
from ffsplit.store import scratch as module
from ffsplit.store.scratch import Scratch
from ffsplit.store.store import Store
from tests.s3.fault_proxy import UNAVAILABLE, Fault, FaultProxy


@pytest.fixture
def place(store: Store) -> Scratch:
    module._store.cache_clear()
    return Scratch(uri=store.uri, prefix=".scratch/0123456789abcdef/stage")


def file_with(folder: Path, data: bytes) -> Path:
    path = folder / "made.safetensors"
    path.write_bytes(data)
    return path


def test_what_was_saved_is_found_and_what_was_not_is_not(place: Scratch, tmp_path: Path) -> None:
    saved = place.save("one", {"one.safetensors": file_with(tmp_path, b"weights")}, facts={"n": 1})
    found = place.load("one")
    assert found == saved.model_copy(update={"reused": True})
    assert place.load("two") is None


@pytest.mark.parametrize("damage", ["file missing", "file changed", "file shorter", "record changed"])
def test_what_is_damaged_counts_as_not_done(
    place: Scratch, store: Store, tmp_path: Path, damage: str
) -> None:
    place.save("one", {"one.safetensors": file_with(tmp_path, b"weights")}, facts={})
    key = place.key("one.safetensors")
    if damage == "file missing":
        store.delete(key)
    elif damage == "record changed":
        record = store.get_bytes(place.key("one.json"))
        store.put_bytes(place.key("one.json"), record.replace(b'"facts":{}', b'"facts":{"a":1}'))
    else:
        store.put_bytes(key, b"heights" if damage == "file changed" else b"w")
    assert place.load("one") is None


@pytest.mark.parametrize("error", [StoreError("cannot read: 503"), ConfigError("cannot read: expired token")])
@pytest.mark.parametrize("method", ["get_bytes", "fetch"])
def test_a_store_that_cannot_say_is_an_error(
    place: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: FFSplitError
) -> None:
    """Or an outage of a moment would have hours computed again."""
    place.save("one", {"one.safetensors": file_with(tmp_path, b"weights")}, facts={})

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(module._store(place.uri), method, fail)
    with pytest.raises(type(error), match="cannot read"):
        place.load("one")
    with pytest.raises(type(error), match="cannot read"):
        place.load_or_compute("one", lambda: pytest.fail("computed again"))


@pytest.mark.parametrize(
    ("error", "said"),
    [(FileNotFoundError(2, "No such file"), None), (OSError(5, "Input/output error"), "Input/output error")],
)
def test_a_file_that_goes_while_it_is_read_is_not_done_and_a_bad_disk_is_an_error(
    place: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str | None
) -> None:
    """Another run of the same key may clean up meanwhile."""
    place.save("one", {"one.safetensors": file_with(tmp_path, b"weights")}, facts={})

    def fail(path: Path) -> str:
        raise error

    monkeypatch.setattr(module, "sha256_file", fail)
    if said is None:
        assert place.load("one") is None
        return
    with pytest.raises(StoreError, match=f"cannot read .*one.safetensors: {said}"):
        place.load("one")


def test_what_another_process_saves_is_not_reported_as_finished(
    place: Scratch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ffsplit")
    assert place.load_or_compute("one", lambda: None) is None
    place.load_or_compute("two", lambda: place.save("two", {}, facts={}))
    said = [record.getMessage() for record in caplog.records if record.name == "ffsplit"]
    assert said == ["started", "started", "finished"]


def test_a_host_that_sees_another_directory_is_refused(place: Scratch, store: Store) -> None:
    place = place.model_copy(update={"witness": f"{place.prefix}/seen-by-all-00"})
    with pytest.raises(ConfigError, match=f"--out {store.uri}: host .* has joined and cannot see it"):
        place.load_or_compute("one", lambda: pytest.fail("computed"))
    store.put_bytes(str(place.witness), b"")
    assert place.load_or_compute("one", lambda: place.save("one", {}, facts={})).name == "one"


def test_a_directory_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may read anywhere")
    place = Scratch(uri=str(tmp_path / "out"), prefix=".scratch/0123456789abcdef/stage")
    place.save("one", {}, facts={})
    folder = tmp_path / "out" / place.prefix
    folder.chmod(0)
    try:
        with pytest.raises(StoreError, match="permission denied"):
            place.load("one")
    finally:
        folder.chmod(0o700)


@pytest.fixture
def proxied(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Scratch, FaultProxy]]:
    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    module._store.cache_clear()
    yield Scratch(uri=s3_uri, prefix=".scratch/0123456789abcdef/stage"), proxy
    proxy.close()
    module._store.cache_clear()


NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno\n"


@pytest.mark.s3
@pytest.mark.parametrize("reply", [UNAVAILABLE, NOT_FOUND], ids=["503", "a gateway's 404"])
@pytest.mark.parametrize("request_line", [rb"GET .*one\.json", rb"HEAD .*one\.safetensors"])
def test_only_no_such_key_means_never_computed(
    proxied: tuple[Scratch, FaultProxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request_line: bytes,
    reply: bytes,
) -> None:
    place, proxy = proxied
    place.save("one", {"one.safetensors": file_with(tmp_path, b"weights")}, facts={})
    monkeypatch.setattr(s3_client, "backoff_s", lambda attempt: 0.0)
    proxy.faults.append(Fault("refused", 10**6, re.compile(request_line).match, reply=reply))
    with pytest.raises(StoreError, match="cannot"):
        place.load("one")
    assert proxy.faults[0].struck
    proxy.faults.clear()
    assert place.load("one") is not None
    assert place.load("two") is None


def test_a_series_keeps_its_last_and_never_less(place: Scratch, store: Store, tmp_path: Path) -> None:
    assert place.load_newest("progress") is None
    for number in (5, 10, 100):
        place.save_next("progress", number, file_with(tmp_path, b"%d" % number))
        newest = place.load_newest("progress")
        assert newest is not None and newest.facts == {"number": number}
    names = [key.removeprefix(f"{place.prefix}/") for key in store.list(place.prefix)]
    assert names == ["progress-00000100.json", "progress-00000100.safetensors"]


def test_a_series_goes_back_to_what_is_whole(place: Scratch, store: Store, tmp_path: Path) -> None:
    place.save_next("progress", 5, file_with(tmp_path, b"5"))
    store.put_bytes(place.key("progress-00000010.safetensors"), b"its record never came")
    assert (newest := place.load_newest("progress")) is not None and newest.facts == {"number": 5}
    place.save("progress-00000020", {"progress-00000020.safetensors": file_with(tmp_path, b"20")}, facts={})
    store.put_bytes(place.key("progress-00000020.safetensors"), b"damaged")
    assert (newest := place.load_newest("progress")) is not None and newest.facts == {"number": 5}
    place.save_next("progress", 15, file_with(tmp_path, b"15"))
    assert not store.exists(place.key("progress-00000010.safetensors"))


def test_a_state_that_is_replaced_while_it_is_read_is_not_lost(
    place: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker, given up and still alive, writes the next one and removes what was listed."""
    place.save_next("progress", 5, file_with(tmp_path, b"5"))
    load = Scratch.load

    def late(self: Scratch, name: str) -> Any:
        monkeypatch.setattr(Scratch, "load", load)
        place.save_next("progress", 10, file_with(tmp_path, b"10"))
        return load(self, name)

    monkeypatch.setattr(Scratch, "load", late)
    assert (newest := place.load_newest("progress")) is not None and newest.facts == {"number": 10}


def test_parts_of_a_state_stay_until_all_are_written(tmp_path: Path) -> None:
    """A series whose name begins like another's, or holds a number, is another."""
    place = Scratch(uri=str(tmp_path / "out"), prefix="run/heal")
    for number in (3, 12):
        for part in ("progress-0-of-2", "progress-1-of-2"):
            place.save_numbered(part, number, file_with(tmp_path, part.encode()))
    place.save_numbered("progress", 9, file_with(tmp_path, b"whole"))
    assert place.numbers("progress-0-of-2") == [3, 12] and place.numbers("progress") == [9]
    place.drop_older("progress-0-of-2", 12)
    assert place.numbers("progress-0-of-2") == [12] and place.numbers("progress-1-of-2") == [3, 12]
    assert place.load_numbered("progress-0-of-2", 3) is None
    found = place.load_numbered("progress-1-of-2", 3)
    assert found is not None and place.path(found.files[0]).read_bytes() == b"progress-1-of-2"


def test_a_record_of_a_later_version_is_read(place: Scratch, store: Store, tmp_path: Path) -> None:
    place.save("one", {"one.safetensors": file_with(tmp_path, b"weights")}, facts={})
    record = json.loads(store.get_bytes(place.key("one.json")).partition(b"\n")[0])
    record["files"][0]["compression"] = "none"
    data = json.dumps(record | {"host": "later"}).encode()
    store.put_bytes(place.key("one.json"), data + b"\n" + module._sha256(data))
    found = place.load("one")
    assert found is not None and found.files[0].size_bytes == 7
    assert found.model_dump()["host"] == "later"
