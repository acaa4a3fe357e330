"""Networks that lose replies, break, stall and refuse: nothing corrupt is published, nothing half pulled."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from ffsplit.errors import FFSplitError
from ffsplit.store import s3 as s3_module
from ffsplit.store import transfer
from ffsplit.store.commits import list_runs, read_commit
from ffsplit.store.gc import collect, plan
from ffsplit.store.pull import pull, verify
from ffsplit.store.store import open_store
from tests.s3.fault_proxy import Fault, FaultProxy
from tests.store.attempts import ATTEMPT, RUN_KEY, publish, publish_directory, write_attempt
from tests.store.test_artifact import cache

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]

BIG = hashlib.shake_128(b"weights").digest(6 << 20)
FILES = {"config.json": b"{}", "model.safetensors": BIG}
OPERATIONS = {
    "put a file": rb"PUT .*/config\.json ",
    "begin an upload": rb"POST .*\?uploads",
    "send a part": rb"PUT .*partNumber=",
    "finish an upload": rb"POST .*uploadId=",
    "ask for a size": rb"HEAD ",
    "put the manifest": rb"PUT .*/manifest\.json ",
    "commit": rb"PUT .*/commit\.json ",
    "read the commit": rb"GET .*/commit\.json ",
    "move the hint": rb"PUT .*/(latest|index)\.json ",
    "list": rb"GET .*list-type=2",
    "read the manifest": rb"GET .*/manifest\.json ",
    "read a range": rb"GET .*/model\.safetensors ",
}
FAULTS = {
    "reply lost": ("lost", 2, 0),
    "refused with 503": ("refused", 3, 0),
    "reply cut off": ("cut", 3, 100),
    "body cut off": ("cut", 2, 300_000),
    "request cut off": ("cut_up", 2, 70_000),
    "slow": ("drip", 9, 0),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, so that every kind of request takes place, and no waiting between attempts."""
    config = s3_module._TRANSFER
    monkeypatch.setattr(config, "multipart_threshold", 5 << 20)
    monkeypatch.setattr(config, "multipart_chunksize", 5 << 20)
    monkeypatch.setattr(transfer, "PART_BYTES", 1 << 20)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0)
    monkeypatch.setattr(s3_module, "backoff_s", lambda attempt: 0.0)


def struck_while(
    proxy: FaultProxy, faults: list[Fault], uri: str, directory: Path, copy: Path
) -> tuple[bool, bool]:
    """Publish and pull through faults; whether each came through. What came through is whole."""
    proxy.faults[:] = faults
    published = pulled = False
    try:
        publish_directory(open_store(uri), directory)
        published = True
        pull(uri, copy)
        pulled = True
    except FFSplitError as error:
        assert "\n" not in str(error)
    finally:
        proxy.faults.clear()
    return published, pulled


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_happens_on_the_way(
    proxy: FaultProxy, uri: str, tmp_path: Path, fault: str, operation: str
) -> None:
    directory = write_attempt(tmp_path / "attempt", files=FILES)
    kind, times, after_bytes = FAULTS[fault]
    faults = [Fault(kind, times, re.compile(OPERATIONS[operation]).match, after_bytes)]
    published, pulled = struck_while(proxy, faults, uri, directory, tmp_path / "copy")
    assert faults[0].struck
    assert (tmp_path / "copy").exists() == pulled
    if published or read_commit(open_store(uri), RUN_KEY):
        assert verify(uri).ok
    assert struck_while(proxy, [], uri, directory, tmp_path / "again") == (True, True)
    for whole in (tmp_path / "again", tmp_path / "copy") if pulled else (tmp_path / "again",):
        assert (whole / "model.safetensors").read_bytes() == BIG
    assert open_store(uri).list_directories(RUN_KEY) == [ATTEMPT]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_happens_to_a_collection(proxy: FaultProxy, uri: str, tmp_path: Path, fault: str) -> None:
    """What is deleted goes commit first, so that no reader finds a part of it, and what stays is whole."""
    store = open_store(uri)
    for number in range(3):
        publish(store, tmp_path / f"{number}", run_key=f"{number:016x}")
    kind, times, after_bytes = FAULTS[fault]
    planned = plan(store, keep_last=1)
    proxy.faults[:] = [Fault(kind, times, re.compile(rb"DELETE ").match, after_bytes)]
    with suppress(FFSplitError):
        collect(store, planned)
    assert proxy.faults[0].struck
    proxy.faults.clear()
    for run in list_runs(store):
        assert verify(f"{uri}/{run.commit.run_key}").ok
    collect(store, plan(store, keep_last=1, min_age=timedelta(0)))
    assert store.list_directories("") == [f"{2:016x}"]


def test_faults_of_every_kind_are_overcome(proxy: FaultProxy, uri: str, tmp_path: Path) -> None:
    """One of each: the retries that are built in suffice."""
    directory = write_attempt(tmp_path / "attempt", files=FILES)
    faults = [Fault(kind, 1, after_bytes=after_bytes) for kind, _, after_bytes in FAULTS.values()]
    assert struck_while(proxy, faults, uri, directory, tmp_path / "copy") == (True, True)
    assert [fault.struck for fault in faults[:3]] == [1, 1, 1]


def test_the_reply_to_a_commit_is_lost(proxy: FaultProxy, uri: str, tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt", files=FILES)
    lost = Fault("lost", 1, lambda line: line.startswith(b"PUT ") and b"commit.json" in line)
    assert struck_while(proxy, [lost], uri, directory, tmp_path / "copy") == (True, True)
    assert lost.struck == 1


def test_a_pull_goes_on_where_the_network_went_away(proxy: FaultProxy, uri: str, tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt", files=FILES)
    struck_while(proxy, [], uri, directory, tmp_path / "copy")
    down = Fault("refused", 10**6, lambda line: b"model.safetensors" in line)
    proxy.faults[:] = [Fault("drip", 3, lambda line: b"model.safetensors" in line), down]
    with pytest.raises(FFSplitError):
        pull(uri, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    seen: list[bytes] = []
    proxy.faults[:] = [Fault("watch", 10**6, lambda line: seen.append(line) or False)]  # type: ignore[func-returns-value]
    pull(uri, tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == BIG
    assert 1 <= len([line for line in seen if b"model.safetensors" in line]) <= 6
