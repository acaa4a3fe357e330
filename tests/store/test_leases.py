"""Who may remove a scratch: the last run that holds it, once it is committed, and otherwise `gc`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ffsplit.errors import StoreError
from ffsplit.store import scratch as leases
from ffsplit.store.gc import collect, plan
from ffsplit.store.scratch import Lease, Scratch
from ffsplit.store.store import Store, open_store

WORK, ONE, TWO = "a" * 16, "1" * 16, "2" * 16
PREFIX = f".scratch/{WORK}"
NO_AGE = timedelta(0)


def scratch_of(store: Store) -> Scratch:
    return Scratch(uri=store.uri, prefix=PREFIX)


def lease(store: Store, run_key: str, note: Callable[[str], object] = print) -> Lease:
    return Lease(store, scratch_of(store), run_key=run_key, note=note)


@pytest.fixture
def filled(store: Store) -> Store:
    store.put_bytes(f"{PREFIX}/calibrate/shard-00000.json", b"{}")
    store.put_bytes(f"{PREFIX}/seen-by-all-00", b"")
    return store


def pieces(store: Store) -> list[str]:
    return [key for key in store.list(".scratch") if "/owners/" not in key]


def test_a_run_removes_what_only_it_holds(filled: Store) -> None:
    with lease(filled, ONE) as held:
        assert len(list(filled.list(f"{PREFIX}/owners"))) == 1
        held.remove_scratch()
        assert list(filled.list(".scratch")) == []
    assert list(filled.list(".scratch")) == []


def test_a_run_that_is_refused_or_fails_leaves_everything_but_its_hold(filled: Store) -> None:
    with lease(filled, ONE):
        pass
    with pytest.raises(KeyboardInterrupt), lease(filled, ONE):
        raise KeyboardInterrupt
    assert len(pieces(filled)) == 2 and list(filled.list(f"{PREFIX}/owners")) == []


def test_what_another_run_holds_stays_and_the_last_one_removes_it(filled: Store) -> None:
    notes: list[str] = []
    with lease(filled, ONE, notes.append) as first, lease(filled, TWO) as second:
        first.remove_scratch()
        assert len(pieces(filled)) == 2 and notes == [f"{filled.uri}/{PREFIX} stays: run {TWO} uses it"]
        second.remove_scratch()
        assert list(filled.list(".scratch")) == []


def test_another_driver_of_the_same_run_holds_nothing_against_it(filled: Store) -> None:
    """Its result is there: it ends well, whatever becomes of the pieces. A killed driver is such a one."""
    with lease(filled, ONE), lease(filled, ONE) as second:
        second.remove_scratch()
        assert pieces(filled) == []


def test_of_two_that_end_at_once_one_removes_it(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each announces itself before either looks."""
    announced, holders = threading.Barrier(2), leases.holders

    def look_together(entries: Any, *, now: Any) -> set[str]:
        announced.wait(30)
        return holders(entries, now=now)

    monkeypatch.setattr(leases, "holders", look_together)
    with lease(open_store(filled.uri), ONE) as first, lease(open_store(filled.uri), TWO) as second:
        threads = [threading.Thread(target=each.remove_scratch) for each in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(filled.list(".scratch")) == []


def test_who_begins_during_a_removal_waits_until_it_is_over(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    removing, begun = threading.Event(), threading.Event()
    delete_prefix = type(filled).delete_prefix

    def slowly(self: Any, prefix: str) -> None:
        removing.set()
        while not notes:  # until the other one has said that it waits
            begun.wait(0.01)
        delete_prefix(self, prefix)

    monkeypatch.setattr(type(filled), "delete_prefix", slowly)
    monkeypatch.setattr(leases, "LOOK_EVERY_S", 0.01)
    with ExitStack() as stack:
        first = stack.enter_context(lease(open_store(filled.uri), ONE))
        thread = threading.Thread(target=first.remove_scratch)
        thread.start()
        assert removing.wait(30)
        stack.enter_context(lease(filled, TWO, notes.append))
        thread.join()
        assert pieces(filled) == [] and len(list(filled.list(f"{PREFIX}/owners"))) == 1
        filled.put_bytes(f"{PREFIX}/calibrate/shard-00000.json", b"mine")
    assert pieces(filled) == [f"{PREFIX}/calibrate/shard-00000.json"]
    assert len(notes) == 1 and "waiting for it to end" in notes[0]


def test_a_record_that_a_removal_took_along_is_written_again(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal may list the new record, and end, between its being written and the look for removals."""
    put, taken = type(filled).put_bytes, []

    def put_bytes(self: Any, key: str, data: bytes) -> None:
        put(self, key, data)
        if f"{PREFIX}/owners/{TWO}" in key and not taken:
            taken.append(key)
            self.delete(key)

    monkeypatch.setattr(type(filled), "put_bytes", put_bytes)
    monkeypatch.setattr(leases, "LOOK_EVERY_S", 0.01)
    with lease(filled, TWO):
        assert list(filled.list(f"{PREFIX}/owners")) == taken


@pytest.mark.parametrize("shift_s", [-leases.LEASE.total_seconds() - 5, 3600], ids=["killed", "clock back"])
@pytest.mark.parametrize("name", [f"{TWO}-00", "closing-00"])
def test_who_was_killed_holds_nothing_once_the_lease_is_over(
    tmp_path: Path, name: str, shift_s: float
) -> None:
    """Nor does a record from the future, as one is if the clock went back: it would be held until then."""
    store = open_store(str(tmp_path))
    store.put_bytes(f"{PREFIX}/calibrate/shard-00000.json", b"{}")
    key = f"{PREFIX}/owners/{name}.json"
    store.put_bytes(key, b"{}")
    renewed_at = (tmp_path / key).stat().st_mtime + shift_s
    os.utime(tmp_path / key, (renewed_at, renewed_at))
    with lease(store, ONE) as held:
        held.remove_scratch()
    assert list(store.list(".scratch")) == []


def test_gc_takes_what_is_from_the_future(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for key in (f"{PREFIX}/calibrate/shard-00000.json", f"{PREFIX}/owners/{TWO}-00.json"):
        store.put_bytes(key, b"{}")
        os.utime(tmp_path / key, (2e9, 2e9))
    planned = plan(store, keep_last=1)
    assert [removal.prefix for removal in planned.removals] == [PREFIX]
    assert collect(store, planned) == list(planned.removals) and list(store.list("")) == []


@pytest.mark.parametrize("error", [StoreError("away"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_cannot_begin_holds_nothing(
    filled: Store, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(prefix: str) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(filled, "list_details", fail)
        with pytest.raises(type(error)), lease(filled, ONE):
            pass
    assert len(pieces(filled)) == 2 and list(filled.list(f"{PREFIX}/owners")) == []


def test_a_hold_is_renewed_also_after_the_store_was_away(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    put_bytes, renewed, calls = filled.put_bytes, threading.Event(), []

    def strike(key: str, data: bytes) -> None:
        calls.append(key)
        if len(calls) in (2, 3):
            raise StoreError("away")
        put_bytes(key, data)
        if len(calls) > 3:
            renewed.set()

    monkeypatch.setattr(filled, "put_bytes", strike)
    monkeypatch.setattr(leases, "RENEW_EVERY_S", 0.01)
    with lease(filled, ONE, notes.append):
        assert renewed.wait(30)
    assert len(set(calls)) == 1 and notes[0].endswith("cannot renew this run's hold on it: away")
    assert len(notes) == 1


def test_a_store_that_cannot_remove_is_said(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    def refuse(key: str) -> None:
        raise StoreError("denied")

    with lease(filled, ONE, notes.append) as held:
        monkeypatch.setattr(filled, "delete_prefix", refuse)
        held.remove_scratch()
    assert notes == [f"warning: {filled.uri}/{PREFIX} was not removed: denied: ffsplit gc will remove it"]


def test_gc_takes_the_scratch_of_nobody_and_no_other(filled: Store) -> None:
    with lease(filled, ONE):
        assert plan(filled, keep_last=1, min_age=NO_AGE).removals == ()
    planned = plan(filled, keep_last=1, min_age=NO_AGE)
    assert [removal.prefix for removal in planned.removals] == [PREFIX]
    with lease(filled, ONE):
        assert collect(filled, planned) == []
        assert len(pieces(filled)) == 2
    assert collect(filled, planned) == list(planned.removals)
    assert list(filled.list(".scratch")) == []
