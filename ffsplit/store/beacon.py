"""Progress within a long task: its worker writes it to the scratch, and the driver reads it there.

This works with every runner and needs no other connection between the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from ffsplit.config import Record
from ffsplit.errors import FFSplitError
from ffsplit.store.schema import read_record
from ffsplit.store.scratch import Scratch
from ffsplit.store.store import open_store

Tell = Callable[[int, int, str], None]
"""Called with the items done, their total, and what is being done or how fast."""
TELL_EVERY_S = 5.0


class Position(Record):
    """Progress of a task."""

    done: int
    total: int
    doing: str


class Beacon(Record):
    """Where a task reports its progress. Small and picklable, for a job's record."""

    scratch: Scratch
    name: str

    @property
    def _key(self) -> str:
        return self.scratch.key(f"position/{self.name}.json")

    def teller(self, *, every_s: float = TELL_EVERY_S) -> Tell:
        """For the worker. Writes at most this often, and never fails: the task matters more."""
        last = time.monotonic()

        def tell(done: int, total: int, doing: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < every_s:
                return
            last = now
            position = Position(done=done, total=total, doing=doing)
            with suppress(FFSplitError):
                open_store(self.scratch.uri).put_bytes(self._key, position.model_dump_json().encode())

        return tell

    def read(self) -> Position | None:
        """For the driver. None if nothing was reported, or the store does not answer."""
        with suppress(FFSplitError):
            return read_record(Position, open_store(self.scratch.uri).get_bytes(self._key), name=self._key)
        return None


def tell_nobody(done: int, total: int, doing: str) -> None:
    """For a task whose progress is not shown."""
