"""What a bucket guarantees is found out once, and kept there for later runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit.api import calibrate
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.store import s3 as s3_module
from ffsplit.store.entries import StoreGuarantees
from ffsplit.store.gc import collect, plan
from ffsplit.store.s3 import MAX_STORE_RECORD_BYTES, PROBE_AGAIN_AFTER, STORE_RECORD, S3Store, StoreRecord
from ffsplit.store.store import open_store
from tests.s3.fault_proxy import Fault, FaultProxy
from tests.small_jobs import SmallJob

from .attempts import from_the_future, publish

pytestmark = pytest.mark.s3
Probes = list[str]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    """The prefix of every probe that is made from here on."""
    made: Probes = []
    probe = s3_module.probe

    def noted(*arguments: Any, prefix: str, **options: Any) -> StoreGuarantees:
        made.append(prefix)
        return probe(*arguments, prefix=prefix, **options)

    monkeypatch.setattr(s3_module, "probe", noted)
    return made


@pytest.fixture
def store(s3_uri: str, probes: Probes) -> S3Store:
    """A store that was probed."""
    opened = open_store(s3_uri)
    assert isinstance(opened, S3Store)
    opened.check_writable()
    probes.clear()
    return opened


def recorded(store: S3Store) -> StoreRecord:
    return StoreRecord.model_validate_json(store.get_bytes(STORE_RECORD))


def requests(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every request that a store makes from here on."""
    made: list[str] = []
    store._client.meta.events.register("before-call.s3", lambda model, **_: made.append(model.name))
    return made


def test_two_runs_probe_once(small_job: SmallJob, s3_uri: str, probes: Probes) -> None:
    """And both manifests say what was found."""
    first = calibrate(small_job.config(s3_uri))
    second = calibrate(small_job.config(s3_uri, seed=1))
    assert first.run_key != second.run_key and first.store == second.store is not None
    assert len(probes) == 1


def test_the_record_says_what_was_found_when_and_by_whom(store: S3Store) -> None:
    record = recorded(store)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(record.probed_at)
    assert timedelta(0) <= age + timedelta(seconds=1) < timedelta(minutes=1)
    assert (record.ffsplit_version, record.schema_version) == (ffsplit.__version__, "1.0")
    assert record.endpoint == store._client.meta.endpoint_url
    assert record.guarantees == store.check_writable()


def test_a_store_that_is_known_costs_two_requests(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.get_bytes(STORE_RECORD)
    made = requests(store, monkeypatch)
    store.check_writable()
    assert made == ["GetObject", "PutObject"]
    assert store.get_bytes(STORE_RECORD) == before


def test_a_record_of_a_newer_minor_version_is_read(store: S3Store, probes: Probes) -> None:
    """And left as it is."""
    record = recorded(store).model_copy(
        update={"guarantees": StoreGuarantees(conditional_put="not atomic", checksums=("blake3",))}
    )
    written = json.dumps(from_the_future(record) | {"schema_version": "1.9"}).encode()
    store.put_bytes(STORE_RECORD, written)
    found = store.check_writable()
    assert (found.conditional_put, found.checksums) == ("not atomic", ("blake3",))
    assert probes == [] and store.get_bytes(STORE_RECORD) == written


def test_a_record_of_a_newer_major_version_stays_and_is_not_believed(store: S3Store, probes: Probes) -> None:
    written = json.dumps(recorded(store).model_dump() | {"schema_version": "2.0"}).encode()
    store.put_bytes(STORE_RECORD, written)
    store.check_writable()
    assert len(probes) == 1 and store.get_bytes(STORE_RECORD) == written


def replaced(**fields: Any) -> Callable[[StoreRecord], bytes]:
    return lambda record: json.dumps(record.model_dump() | fields).encode()


def aged(age: timedelta) -> Callable[[StoreRecord], bytes]:
    def write(record: StoreRecord) -> bytes:
        return replaced(probed_at=(datetime.now(timezone.utc) - age).isoformat())(record)

    return write


@pytest.mark.parametrize(
    "write",
    [
        lambda record: b"",
        lambda record: b"\xff{",
        lambda record: record.model_dump_json().encode()[:-9],
        lambda record: record.model_dump_json().encode() + b" " * MAX_STORE_RECORD_BYTES,
        replaced(guarantees=None),
        replaced(probed_at="yesterday"),
        replaced(probed_at="2026-01-01T00:00:00"),
        aged(PROBE_AGAIN_AFTER + timedelta(minutes=1)),
        aged(-PROBE_AGAIN_AFTER - timedelta(minutes=1)),
        replaced(endpoint="http://another.example"),
    ],
    ids=[
        "empty",
        "no text",
        "cut off",
        "too large",
        "no answer",
        "no time",
        "no zone",
        "old",
        "not yet",
        "copied",
    ],
)
def test_a_record_that_does_not_count_is_replaced(
    store: S3Store, probes: Probes, write: Callable[[StoreRecord], bytes]
) -> None:
    record = recorded(store)
    store.put_bytes(STORE_RECORD, write(record))
    assert store.check_writable() == recorded(store).guarantees
    assert len(probes) == 1 and recorded(store).counts(endpoint=record.endpoint)
    store.check_writable()
    assert len(probes) == 1


def test_a_record_counts_for_30_days(store: S3Store, probes: Probes) -> None:
    store.put_bytes(STORE_RECORD, aged(PROBE_AGAIN_AFTER - timedelta(minutes=1))(recorded(store)))
    store.check_writable()
    assert probes == []


def test_a_record_that_vanishes_meanwhile_is_written_again(
    store: S3Store, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = s3_module.read_at_most

    def vanishing(source: S3Store, key: str, max_bytes: int) -> bytes:
        data = read(source, key, max_bytes)
        source.delete(key)
        return data

    monkeypatch.setattr(s3_module, "read_at_most", vanishing)
    store.check_writable()
    assert len(probes) == 1 and store.exists(STORE_RECORD)


def test_a_server_that_ignores_conditions_by_now_is_refused(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ceph does once its bucket has versions: a record is no proof of that."""
    put = store._client.put_object

    def ignoring(*, IfNoneMatch: str = "", **arguments: Any) -> Any:
        return put(**arguments)

    monkeypatch.setattr(store._client, "put_object", ignoring)
    with pytest.raises(ConfigError, match="ignores If-None-Match"):
        store.check_writable()


def test_a_known_store_that_cannot_be_written_to_ends_the_run_at_once(
    small_job: SmallJob,
    store: S3Store,
    probes: Probes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, before anything is computed or written."""
    body = b"<Error><Code>AccessDenied</Code><Message>Access denied</Message></Error>"
    head = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
    proxy = FaultProxy(int(store._client.meta.endpoint_url.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    written = replaced(endpoint=f"http://127.0.0.1:{proxy.port}")(recorded(store))
    store.put_bytes(STORE_RECORD, written)
    proxy.faults.append(Fault("refused", 10**6, re.compile(rb"PUT ").match, reply=head % len(body) + body))
    assert main(["compress", *small_job.arguments(store.uri, "--runner", "serial")]) == 2
    proxy.close()
    said = capsys.readouterr().err
    assert f"cannot write to {store.uri}: Access denied" in said and said.count("\n") == 1
    assert probes == [] and list(store.list("")) == [STORE_RECORD]


def test_a_collection_leaves_it_alone(store: S3Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    collect(store, plan(store, keep_last=0, min_age=timedelta(0)))
    assert store.exists(STORE_RECORD)


def test_a_local_store_needs_none(small_job: SmallJob, tmp_path: Path, probes: Probes) -> None:
    calibrate(small_job.config(tmp_path / "out"))
    assert probes == [] and not (tmp_path / "out" / ".ffsplit").exists()
