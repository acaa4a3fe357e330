"""One batch at a time per destination: the second waits, and none is lost, whatever becomes of the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ffsplit.errors import StoreError
from ffsplit.store.store import Store, open_store
from ffsplit.zoo import turns
from ffsplit.zoo.batch import batch_ids, new_batch_id, past_batches
from ffsplit.zoo.run import run_zoo
from ffsplit.zoo.turns import own_turn
from tests.small_jobs import SmallJob
from tests.zoo.test_run import zoo, zoo_file

COMMAND = [sys.executable, "-m", "ffsplit.cli", "zoo"]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LOOK_EVERY_S", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "zoo"))


def newest(store: Store) -> turns.Turn:
    found = turns._parse(turns._newest(store)[1])
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_many_batches_run_one_after_the_other(kind: str, request: pytest.FixtureRequest) -> None:
    store = (
        open_store(request.getfixturevalue("s3_uri")) if kind == "s3" else request.getfixturevalue("store")
    )
    running, most, order = 0, 0, []

    def batch(name: int) -> None:
        nonlocal running, most
        with own_turn(open_store(store.uri), lambda line: None):
            running += 1
            most = max(most, running)
            order.append(name)
            threading.Event().wait(0.02)
            running -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(batch, range(8)))
    assert most == 1 and sorted(order) == list(range(8))
    assert list(store.list(turns.TURNS_PREFIX)) == [".turns/00000008.json"]
    assert newest(store).is_over


def test_who_waits_says_for_whom(store: Store) -> None:
    said: list[str] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    def second() -> None:
        with own_turn(open_store(store.uri), say):
            pass

    with own_turn(store, print):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert newest(store).number == 1
    thread.join(30)
    assert said[0].startswith("waiting: the batch of ") and said[0].endswith(f" is running in {store.uri}")
    assert said[1].endswith(" has ended: this one begins") and len(said) == 2
    assert newest(store).number == 2


def test_a_batch_that_was_killed_on_this_machine_is_not_waited_for(store: Store) -> None:
    code = "from ffsplit.zoo.turns import own_turn; from ffsplit.store.store import open_store\n"
    code += f"with own_turn(open_store({store.uri!r}), print): print('begun', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    assert not turns._has_ended(newest(store))
    process.kill()
    while turns._start_of(process.pid) is not None:
        pass  # it becomes a zombie, which counts as ended
    with own_turn(store, print):
        assert newest(store).number == 2
    process.communicate()


@pytest.mark.parametrize("data", [None, b"damaged"])
def test_a_batch_of_another_machine_is_void_when_it_stays_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, data: bytes | None
) -> None:
    """As when its machine is gone. Its times do not matter: here it says it began next year."""
    turn = turns._new_turn(7).model_copy(update={"machine": "another", "since": "2036-01-01 00:00 UTC"})
    store.put_bytes(turns._key(7), data or turn.model_dump_json().encode())
    (Path(store.uri) / turns._key(7)).touch()
    os.utime(Path(store.uri) / turns._key(7), (2e9, 2e9))
    monkeypatch.setattr(turns, "VOID_AFTER_S", 0.2)
    with own_turn(store, print):
        assert newest(store).number == 8
    assert list(store.list(turns.TURNS_PREFIX)) == [turns._key(8)]


def test_a_turn_that_is_renewed_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its batch runs on another machine, and for longer than it takes to be void."""
    monkeypatch.setattr(turns, "VOID_AFTER_S", 0.5)
    monkeypatch.setattr(turns, "RENEW_EVERY_S", 0.02)
    monkeypatch.setattr(turns, "_this_machine", lambda: None)
    begun = threading.Event()

    def second() -> None:
        with own_turn(open_store(store.uri), print):
            begun.set()

    with own_turn(store, print):
        thread = threading.Thread(target=second)
        thread.start()
        assert not begun.wait(1.5)
    assert begun.wait(30)
    thread.join()


def test_who_was_suspended_is_told_that_another_has_begun(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "RENEW_EVERY_S", 0.01)
    told = threading.Event()
    with own_turn(store, lambda line: told.set() if "another batch has begun" in line else None):
        store.put_bytes(turns._key(2), b"{}")
        assert told.wait(30)


def test_a_store_that_is_away_ends_no_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuse(key: str, data: bytes) -> None:
        raise StoreError("away")

    monkeypatch.setattr(turns, "RENEW_EVERY_S", 0.01)
    with own_turn(store, said.append):
        monkeypatch.setattr(store, "put_bytes", refuse)
        while not said:
            threading.Event().wait(0.01)
    assert said == [
        f"warning: {store.uri}: cannot renew this batch's turn: away",
        f"warning: the next batch in {store.uri} may wait 2 minutes: away",
    ]


@pytest.mark.subprocess
def test_two_batches_that_start_at_once(small_job: SmallJob) -> None:
    """The second computes nothing twice, and both leave their document."""
    file = zoo_file(small_job, {"name": "one"}, {"name": "two"})
    pair = [
        subprocess.Popen(
            [*COMMAND, str(file), "--runner", "serial", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ended
    states = {tuple(model["state"] for model in json.loads(out)["models"]) for out, _ in ended}
    assert states == {("published", "published"), ("committed already", "committed already")}
    (late,) = (err for out, err in ended if "committed already" in out)
    assert late.startswith("waiting: the batch of ")
    found = past_batches(open_store(str(small_job.folder / "zoo")))
    assert [model.state for batch in found for model in batch.models] == [
        *["published"] * 2,
        *["committed already"] * 2,
    ]
    assert found[0].finished_at <= found[1].started_at


@pytest.mark.subprocess
def test_a_batch_that_waits_can_be_interrupted(small_job: SmallJob, store: Store) -> None:
    file = zoo_file(small_job, {"name": "one"})
    with own_turn(store, print):
        waits = subprocess.Popen(
            [*COMMAND, str(file), "--runner", "serial"], stderr=subprocess.PIPE, text=True
        )
        assert waits.stderr is not None and "waiting: " in waits.stderr.readline()
        waits.send_signal(signal.SIGTERM)
        _, err = waits.communicate(timeout=30)
    assert waits.returncode == 130 and err.startswith("ffsplit: interrupted; ") and err.count("\n") == 1
    assert batch_ids(store) == []


def test_names_go_on_where_the_clock_goes_back(small_job: SmallJob) -> None:
    """The last batch ran while the clock was wrong. The next one is the newest all the same."""
    asked = zoo(small_job, {"name": "one", "model": "/none"})
    first = run_zoo(asked, runner="serial", say=lambda line: None)
    store = open_store(asked.destination)
    ahead = new_batch_id(datetime.now(timezone.utc) + timedelta(days=3650))
    document = store.get_bytes(f"batches/{first.id}.json").replace(first.id.encode(), ahead.encode())
    store.put_bytes(f"batches/{ahead}.json", document)
    second = run_zoo(asked, runner="serial", say=lambda line: None)
    assert first.id < ahead < second.id
    assert [each.id for each in past_batches(store)] == [first.id, ahead, second.id]
    assert second.started_at[:4] == str(datetime.now(timezone.utc).year)
    assert "Over the last 3 batches" in (Path(asked.destination) / "index.html").read_text()


def test_names_of_one_second_are_in_order() -> None:
    now = datetime(2026, 10, 25, 0, 59, 59, tzinfo=timezone.utc)
    names = [new_batch_id(now)]
    for _ in range(20):
        names.append(new_batch_id(now, after=names[-1]))
    assert names == sorted(names) and names[-1].startswith("20261025T010019Z-")


def test_names_are_in_utc_where_summer_time_ends() -> None:
    """At half past two in Berlin, which comes twice."""
    summer, winter = (timezone(timedelta(hours=hours)) for hours in (2, 1))
    first = new_batch_id(datetime(2026, 10, 25, 2, 30, tzinfo=summer))
    second = new_batch_id(datetime(2026, 10, 25, 2, 30, tzinfo=winter))
    assert (first[:16], second[:16]) == ("20261025T003000Z", "20261025T013000Z")
