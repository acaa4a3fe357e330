"""Which item runs where, and when: the part of a runner that knows nothing about Ray.

A pool has slots. A slot is opened, reports when it is ready, takes one item at a time and may be lost.
Items are given only to slots that are ready, so a slot that waits for room in the cluster blocks nothing.
The item of a lost slot goes to another slot. There are never more items in flight than slots.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ffsplit import streams
from ffsplit.errors import FFSplitError

Slot = TypeVar("Slot")

LOOK_EVERY_S = 2.0
"""How often a stage looks for room for more workers."""
MAX_LOSSES = 4
"""An item that has lost this many workers is not retried."""
MAX_FAILED_OPENINGS = 12
"""Upper limit on consecutive slots that are lost before they are ready."""
FIRST_PAUSE_S = 0.25
"""Pause before a lost item is retried. It doubles with every loss of the same item."""
WITHOUT_ROOM_S = 600.0
"""How long a stage waits for room after all its workers have left."""
TELL_EVERY_S = 60.0
"""How often a stage reports that it waits for workers to start, while others use the resources."""
START_WITHIN_S = 12 * 3600.0
"""How long a stage without workers waits for a requested one."""


class Ready(NamedTuple):
    """A slot can take an item."""

    slot: Any


class Done(NamedTuple):
    """A slot's item is done. The slot can take another."""

    slot: Any
    answer: Any


class Lost(NamedTuple):
    """A slot is lost, with its item if it had one. `kind` is the error of an item that loses too many."""

    slot: Any
    reason: str
    kind: type[FFSplitError] = FFSplitError


class Failed(NamedTuple):
    """A slot's item raised an error, which ends the stage."""

    slot: Any
    error: BaseException


Event = Ready | Done | Lost | Failed


class Pool(Protocol[Slot]):
    """Where the items of one stage run."""

    def room(self) -> int:
        """How many slots there may be at the moment."""

    def open(self) -> Slot:
        """Begin to open a slot. An event reports when it is ready."""

    def start(self, slot: Slot, item: Any) -> None:
        """Give a slot that is ready an item."""

    def close(self, slot: Slot) -> None:
        """Close a slot and stop its item. Does nothing if it is closed already."""

    def next_event(self, timeout_s: float) -> Event | None:
        """The next event; None if none arrives in time."""


def dispatch(pool: Pool[Any], items: Sequence[Any], *, stage: str) -> Iterator[tuple[int, Any]]:
    """Yield (index, answer) of every item as it is done. No slot is left open.

    Raises what an item raises, and FFSplitError when an item loses too many slots.
    """
    stage_items = _Items(stage, len(items))
    slots = _Slots(pool)
    try:
        while stage_items.num_left:
            slots.adapt(stage_items.num_left - len(slots.in_hand), stage=stage)
            while slots.idle and (index := stage_items.take()) is not None:
                slots.start(index, items[index])
            event = pool.next_event(min(LOOK_EVERY_S, stage_items.next_retry_s()))
            if isinstance(event, Ready):
                slots.ready(event.slot)
            elif isinstance(event, Done):
                index = slots.done(event.slot)
                stage_items.num_left -= 1
                yield index, event.answer
            elif isinstance(event, Lost):
                lost = slots.lose(event, stage=stage)
                if lost is not None:
                    stage_items.put_back(lost, event)
            elif isinstance(event, Failed):
                raise event.error
    finally:
        slots.close_all()


@dataclass
class _Items:
    """The items of a stage that are not done: those that wait, and those to be retried later."""

    stage: str
    num_left: int
    losses: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = deque(range(self.num_left))
        self._later: list[tuple[float, int]] = []

    def take(self) -> int | None:
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[1]
        return self._waiting.popleft() if self._waiting else None

    def put_back(self, index: int, event: Lost) -> None:
        losses = self.losses[index] = self.losses.get(index, 0) + 1
        if losses >= MAX_LOSSES:
            raise event.kind(
                f"{self.stage}: item {index} lost {losses} workers, the last because {event.reason}; "
                "finished work is kept, and the same command resumes from it"
            )
        heapq.heappush(self._later, (time.monotonic() + FIRST_PAUSE_S * 2 ** (losses - 1), index))

    def next_retry_s(self) -> float:
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else LOOK_EVERY_S


class _Slots(Generic[Slot]):
    """The slots of a stage: opening, idle, or with an item in hand."""

    def __init__(self, pool: Pool[Slot]) -> None:
        self._pool = pool
        self.idle: list[Slot] = []
        self.in_hand: dict[Slot, int] = {}
        self._opening: set[Slot] = set()
        self._room, self._looked_at, self._had_room_at = 0, float("-inf"), time.monotonic()
        self._failed_openings = 0
        self._had_slot_at = self._told_at = time.monotonic()

    def __len__(self) -> int:
        return len(self.idle) + len(self.in_hand) + len(self._opening)

    def adapt(self, num_waiting: int, *, stage: str) -> None:
        """Open as many slots as there is room and work for, and close surplus ones."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._room, self._looked_at = self._pool.room(), now
        if self._room > 0 or self.in_hand:
            self._had_room_at = now
        elif now - self._had_room_at > WITHOUT_ROOM_S:
            raise FFSplitError(
                f"{stage}: all workers have left, and there was no room for another in {WITHOUT_ROOM_S:g} s; "
                "finished work is kept, and the same command resumes from it"
            )
        self._look_at_openings(now, stage=stage)
        wanted = min(self._room, len(self.in_hand) + num_waiting)
        while len(self) < wanted:
            self._opening.add(self._pool.open())
        while len(self) > wanted and (self._opening or self.idle):  # prefer to keep those that are ready
            self._pool.close(self._opening.pop() if self._opening else self.idle.pop())

    def _look_at_openings(self, now: float, *, stage: str) -> None:
        """Report that no requested worker starts. Raises FFSplitError after START_WITHIN_S."""
        if self.idle or self.in_hand or not self._opening:
            self._had_slot_at = self._told_at = now
        waited = now - self._had_slot_at
        if waited > START_WITHIN_S:
            raise FFSplitError(
                f"{stage}: no worker has started in {START_WITHIN_S:g} s; finished work is kept, and the "
                "same command resumes from it"
            )
        if now - self._told_at > TELL_EVERY_S:
            self._told_at = now
            streams.note(
                f"{stage}: waiting for room in the cluster: {len(self._opening)} workers requested, none has "
                f"started in {waited:.0f} s (`ray status` shows what takes up the room)"
            )

    def ready(self, slot: Slot) -> None:
        if slot in self._opening:
            self._opening.remove(slot)
            self._failed_openings = 0
            self.idle.append(slot)

    def start(self, index: int, item: Any) -> None:
        slot = self.idle.pop()
        self.in_hand[slot] = index
        self._pool.start(slot, item)

    def done(self, slot: Slot) -> int:
        self.idle.append(slot)
        return self.in_hand.pop(slot)

    def lose(self, event: Lost, *, stage: str) -> int | None:
        """Close a lost slot, since its item may still run. Returns the index of that item."""
        slot: Slot = event.slot
        self._pool.close(slot)
        if slot in self._opening:
            self._opening.remove(slot)
            self._failed_openings += 1
            if self._failed_openings >= MAX_FAILED_OPENINGS:
                raise event.kind(f"{stage}: no worker starts, the last because {event.reason}")
        elif slot in self.idle:
            self.idle.remove(slot)
        self._looked_at = float("-inf")
        return self.in_hand.pop(slot, None)

    def close_all(self) -> None:
        for slot in [*self.idle, *self.in_hand, *self._opening]:
            with suppress(Exception):  # the error that ended the stage matters more
                self._pool.close(slot)
