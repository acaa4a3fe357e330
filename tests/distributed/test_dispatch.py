"""Which item goes where: workers that join late, leave, never start, or take every item down with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from ffsplit.distributed import dispatch as module
from ffsplit.distributed.dispatch import Done, Event, Failed, Lost, Ready, dispatch
from ffsplit.errors import CalibrationError, FFSplitError, OutOfMemoryError


@dataclass
class Pool:
    """Slots in memory. `outcome(slot, item)` says what becomes of an item; events come in order."""

    rooms: list[int]
    outcome: Callable[[int, Any], Event] = lambda slot, item: Done(slot, item * item)
    starts: Callable[[int], Event | None] = lambda slot: Ready(slot)
    opened: int = 0
    open_now: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    most_in_flight: int = 0
    by_slot: dict[int, list[Any]] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=deque)

    def room(self) -> int:
        return self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0]

    def open(self) -> int:
        slot, self.opened = self.opened, self.opened + 1
        self.open_now.add(slot)
        event = self.starts(slot)
        if event is not None:
            self.events.append(event)
        return slot

    def start(self, slot: int, item: Any) -> None:
        assert slot in self.open_now and slot not in self.in_flight
        self.in_flight.add(slot)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self.by_slot.setdefault(slot, []).append(item)
        self.events.append(self.outcome(slot, item))

    def close(self, slot: int) -> None:
        self.open_now.discard(slot)

    def next_event(self, timeout_s: float) -> Event | None:
        if not self.events:
            return None
        event = self.events.popleft()
        self.in_flight.discard(event.slot)
        return event


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)


def test_every_item_is_done_once_and_no_more_are_in_flight_than_there_is_room_for() -> None:
    pool = Pool([3])
    assert sorted(dispatch(pool, range(50), stage="s")) == [(item, item * item) for item in range(50)]
    assert (pool.most_in_flight, pool.opened, pool.open_now) == (3, 3, set())


def test_a_worker_that_joins_late_gets_work() -> None:
    pool = Pool([1] * 10 + [4])
    assert len(list(dispatch(pool, range(60), stage="s"))) == 60
    assert pool.opened == 4
    assert all(pool.by_slot[slot] for slot in range(4))


def test_room_that_shrinks_is_given_back() -> None:
    pool = Pool([4, 4, 4, 1])
    answers = dispatch(pool, range(30), stage="s")
    for _ in range(20):
        next(answers)
    assert len(pool.open_now) == 1
    assert len(list(answers)) == 10


def test_a_lost_worker_costs_the_item_in_hand() -> None:
    calls: list[Any] = []

    def outcome(slot: int, item: Any) -> Event:
        calls.append(item)
        return Lost(slot, "its host left") if item == 7 and calls.count(7) == 1 else Done(slot, item)

    pool = Pool([2], outcome)
    assert sorted(dispatch(pool, range(12), stage="s")) == [(item, item) for item in range(12)]
    assert sorted(calls) == sorted([*range(12), 7])
    assert (pool.opened, pool.open_now) == (3, set())


def test_a_lost_slot_is_closed_at_once() -> None:
    """Its worker may live on, out of reach: it must not go on with an item that another has by then."""
    closed: list[int] = []
    pool = Pool([1], lambda slot, item: Lost(slot, "out of reach") if slot == 0 else Done(slot, item))
    close = pool.close
    pool.close = lambda slot: (closed.append(slot), close(slot))[1]  # type: ignore[method-assign]
    answers = dispatch(pool, range(3), stage="s")
    next(answers)
    assert closed == [0] and pool.open_now == {1}
    assert len(list(answers)) == 2


def test_a_slot_that_is_lost_before_it_is_ready_is_closed() -> None:
    pool = Pool([1], starts=lambda slot: Lost(slot, "its process died") if slot < 2 else Ready(slot))
    assert len(list(dispatch(pool, range(3), stage="s"))) == 3
    assert (pool.opened, pool.open_now) == (3, set())


def test_an_item_that_takes_its_workers_with_it_ends_the_stage() -> None:
    pool = Pool([2], lambda slot, item: Lost(slot, "out of memory") if item == 3 else Done(slot, item))
    with pytest.raises(FFSplitError, match="item 3 lost 4 workers, the last because out of memory"):
        list(dispatch(pool, range(9), stage="calibrate"))
    assert not pool.open_now


def test_an_item_whose_workers_run_out_of_memory_says_so_by_its_error() -> None:
    def outcome(slot: int, item: Any) -> Event:
        return Lost(slot, "out of memory", OutOfMemoryError) if item == 3 else Done(slot, item)

    with pytest.raises(OutOfMemoryError, match="item 3 lost 4 workers, the last because out of memory"):
        list(dispatch(Pool([2], outcome), range(9), stage="calibrate"))
    pool = Pool([2], starts=lambda slot: Lost(slot, "out of memory", OutOfMemoryError))
    with pytest.raises(OutOfMemoryError, match="no worker starts, the last because out of memory"):
        list(dispatch(pool, range(5), stage="s"))


def test_a_worker_that_waits_for_room_holds_no_item_up() -> None:
    pool = Pool([3], starts=lambda slot: Ready(slot) if slot == 1 else None)
    assert len(list(dispatch(pool, range(20), stage="s"))) == 20
    assert set(pool.by_slot) == {1}
    assert not pool.open_now


def test_workers_that_never_start_end_the_stage() -> None:
    pool = Pool([2], starts=lambda slot: Lost(slot, "its process died"))
    with pytest.raises(FFSplitError, match="no worker starts, the last because its process died"):
        list(dispatch(pool, range(5), stage="s"))


def test_room_that_never_comes_back_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WITHOUT_ROOM_S", 0.0)
    with pytest.raises(FFSplitError, match="all workers have left"):
        list(dispatch(Pool([0]), range(5), stage="s"))


def test_room_that_comes_back_in_time_is_used() -> None:
    pool = Pool([0, 0, 2])
    assert len(list(dispatch(pool, range(5), stage="s"))) == 5
    assert (pool.opened, pool.open_now) == (2, set())


def test_an_idle_slot_that_is_lost_gets_no_item() -> None:
    """Its host leaves while there is nothing left to do but what another has in hand."""
    pool = Pool([2])
    slots = module._Slots(pool)
    slots.adapt(2, stage="s")
    for slot in (0, 1):
        slots.ready(slot)
    slots.start(7, 3)
    assert slots.in_hand == {1: 7} and slots.idle == [0]
    assert slots.lose(Lost(0, "its host left"), stage="s") is None
    assert (slots.idle, slots.in_hand, pool.open_now) == ([], {1: 7}, {1})
    assert slots.lose(Lost(1, "its host left"), stage="s") == 7


def test_an_error_ends_the_stage_as_itself_and_leaves_no_slot() -> None:
    def outcome(slot: int, item: Any) -> Event:
        return Failed(slot, CalibrationError("no tokens")) if item == 5 else Done(slot, item)

    pool = Pool([3], outcome)
    with pytest.raises(CalibrationError, match="no tokens"):
        list(dispatch(pool, range(9), stage="s"))
    assert not pool.open_now


def test_who_stops_listening_stops_the_work() -> None:
    pool = Pool([3])
    answers = dispatch(pool, range(9), stage="s")
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not pool.open_now


def test_what_ended_a_stage_is_told_though_its_slots_cannot_be_closed() -> None:
    class Stuck(Pool):
        def close(self, slot: int) -> None:
            raise RuntimeError("the host is gone")

    pool = Stuck([2], outcome=lambda slot, item: Failed(slot, CalibrationError("the first cause")))
    with pytest.raises(CalibrationError, match="the first cause"):
        list(dispatch(pool, [1, 2, 3], stage="stage"))


def test_a_wait_for_workers_that_do_not_start_is_told_and_has_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a cluster that others fill: there is room, and none of it is free."""
    monkeypatch.setattr(module, "TELL_EVERY_S", 0.0)
    monkeypatch.setattr(module, "START_WITHIN_S", 0.05)
    pool = Pool([2], starts=lambda slot: None)
    with pytest.raises(
        FFSplitError, match=r"compress: no worker has started in 0.05 s; finished work is kept"
    ):
        list(dispatch(pool, range(3), stage="compress"))
    assert "compress: waiting for room in the cluster: 2 workers requested" in capsys.readouterr().err
    assert pool.open_now == set()
