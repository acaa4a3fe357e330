"""One batch at a time per destination: a second one waits, however many schedules there are.

    .turns/<number>.json      one batch's turn; the highest number counts

A turn is taken by creating the next number, only if absent, once the one before it is over. Its holder
rewrites it every few seconds. No clocks are compared: a waiting batch measures by its own how long a turn
has stayed the same, so a clock that goes back, or is wrong, neither frees a turn nor keeps one for ever.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from pydantic import ValidationError

from ffsplit.config import Record
from ffsplit.errors import FFSplitError
from ffsplit.store.aliases import this_user
from ffsplit.store.commits import MAX_RECORD_BYTES, record_bytes
from ffsplit.store.store import MissingKey, Store, read_at_most

TURNS_PREFIX = ".turns"
RENEW_EVERY_S = 15.0
VOID_AFTER_S = 120.0
"""A turn that has stayed the same for so long is over: its batch was killed, or cannot reach the store."""
LOOK_EVERY_S = 2.0

Say = Callable[[str], object]


class Turn(Record):
    """A batch's turn, for the batches that wait. `renewals` makes every version of it different."""

    number: int
    id: str
    holder: str
    since: str
    machine: str | None
    process: int
    process_start: str | None
    renewals: int = 0
    is_over: bool = False


@contextmanager
def own_turn(store: Store, say: Say) -> Iterator[None]:
    """Run a batch while no other runs in this store: wait for those before it.

    Raises StoreError if the store fails before the turn has begun.
    """
    turn = _take(store, say)
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(store, turn, over, say), daemon=True, name="ffsplit-turn")
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        try:
            _write(store, turn.model_copy(update={"is_over": True}))
        except FFSplitError as error:
            say(f"warning: the next batch in {store.uri} may wait {VOID_AFTER_S / 60:g} minutes: {error}")


def _take(store: Store, say: Say) -> Turn:
    """Wait for the turns before this one to end, and take the next."""
    seen: tuple[int, bytes] | None = None
    seen_at, told = 0.0, ""
    while True:
        if (newest := _newest(store)) != seen:
            seen, seen_at = newest, time.monotonic()
        number, data = newest
        turn = _parse(data)
        has_ended = number == 0 or (turn is not None and (turn.is_over or _has_ended(turn)))
        if has_ended or time.monotonic() - seen_at > VOID_AFTER_S:
            if told:
                say(f"{told} has ended: this one begins")
            if (mine := _try(store, number + 1)) is not None:
                return mine
            continue
        holder = "another batch" if turn is None else f"the batch of {turn.holder}, begun {turn.since},"
        if holder != told:
            told = holder
            say(f"waiting: {holder} is running in {store.uri}")
        time.sleep(LOOK_EVERY_S)


def _try(store: Store, number: int) -> Turn | None:
    """Take a turn, unless another batch is faster."""
    mine = _new_turn(number)
    store.put_if_absent(_key(number), record_bytes(mine))
    if _newest(store) != (number, record_bytes(mine)):  # the content tells who was first
        return None
    with suppress(FFSplitError):  # earlier turns count no more: one that stays does no harm
        for key in list(store.list(TURNS_PREFIX)):
            if key < _key(number):
                store.delete(key)
    return mine


def _keep(store: Store, turn: Turn, over: threading.Event, say: Say) -> None:
    """Rewrite the turn periodically, even after a failure: the store may recover."""
    renewals, told = 0, False
    while not over.wait(RENEW_EVERY_S):
        renewals += 1
        try:
            _write(store, turn.model_copy(update={"renewals": renewals}))
            if not told and store.exists(_key(turn.number + 1)):
                told = True
                say(f"warning: another batch has begun in {store.uri}: this one could not report for a while")
        except Exception as error:
            if not told:
                say(f"warning: {store.uri}: cannot renew this batch's turn: {error}")
            told = True


def _new_turn(number: int) -> Turn:
    return Turn(
        number=number,
        id=secrets.token_hex(8),
        holder=this_user(),
        since=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M UTC}",
        machine=_this_machine(),
        process=os.getpid(),
        process_start=_start_of(os.getpid()),
    )


def _has_ended(turn: Turn) -> bool:
    """Whether the batch was a process of this machine that is gone. Elsewhere only waiting can tell."""
    is_here = turn.machine is not None and turn.machine == _this_machine()
    return is_here and _start_of(turn.process) != turn.process_start


def _this_machine() -> str | None:
    """What numbers of processes are unique in: this boot of this machine, or of this container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _start_of(process: int) -> str | None:
    """When a process started, in ticks since the boot, which no clock changes; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _newest(store: Store) -> tuple[int, bytes]:
    """The number and content of the newest turn; 0 if there is none."""
    names = (key.rpartition("/")[2].removesuffix(".json") for key in store.list(TURNS_PREFIX))
    number = max((int(name) for name in names if name.isdecimal()), default=0)
    return number, _read(store, number)


def _read(store: Store, number: int) -> bytes:
    with suppress(MissingKey):
        return read_at_most(store, _key(number), MAX_RECORD_BYTES)
    return b""


def _parse(data: bytes) -> Turn | None:
    try:
        return Turn.model_validate_json(data)
    except ValidationError:
        return None


def _write(store: Store, turn: Turn) -> None:
    store.put_bytes(_key(turn.number), record_bytes(turn))


def _key(number: int) -> str:
    return f"{TURNS_PREFIX}/{number:08d}.json"
