"""Who uses a run's scratch, so that nobody removes what another run still needs.

<out>/.scratch/<work key>/owners/<run key>-<id>.json   a run at work; written again every minute
<out>/.scratch/<work key>/owners/closing-<id>.json     a run that is removing this scratch

Runs that differ in their gates alone share a scratch. A run that has committed removes it unless another run
key holds it. Whatever else becomes of a run, its scratch stays for the next one; in the end `ffsplit gc`
collects it. An owner that was not written for LEASE is gone: killed, or cut off from its store. Times are
the store's own, so the clocks of hosts do not matter.

Whoever removes a scratch announces it, and looks for owners then; whoever begins registers, and looks for
announcements then. So of two at once at least one sees the other, and gives way.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from types import TracebackType

from ffsplit.artifacts.scratch import Scratch
from ffsplit.artifacts.stores import Store, Stored
from ffsplit.errors import FFSplitError

OWNERS, CLOSING = "owners", "closing-"
LEASE = timedelta(minutes=10)
RENEW_EVERY_S = 60.0
LOOK_EVERY_S = 1.0


class Lease:
    """A run's hold on its scratch while the context lasts. `note` gets a line on whatever goes wrong."""

    def __init__(
        self, store: Store, scratch: Scratch, *, run_key: str, note: Callable[[str], object]
    ) -> None:
        self._store, self._prefix, self._note, self._run_key = store, scratch.prefix, note, run_key
        name = secrets.token_hex(6)
        self._key = f"{self._prefix}/{OWNERS}/{run_key}-{name}.json"
        self._closing = f"{self._prefix}/{OWNERS}/{CLOSING}{name}.json"
        self._where = f"{store.uri}/{self._prefix}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ffsplit-lease", daemon=True)

    def __enter__(self) -> Lease:
        try:
            self._begin()
        except BaseException:
            with suppress(FFSplitError):  # what is raised says more
                self._store.delete(self._key)
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_renewing()
        try:
            self._store.delete(self._key)
        except FFSplitError as failure:
            minutes = int(LEASE.total_seconds() / 60)
            self._note(f"warning: {self._where} counts as in use for {minutes} minutes: {failure}")

    def remove_scratch(self) -> None:
        """Remove the scratch, since its run is committed, unless another run holds it."""
        self._stop_renewing()
        try:
            self._write(self._closing)
            self._store.delete(self._key)  # of two that end at once, the later one sees no other
            others = holders(self._owners(), now=self._time_of(self._closing)) - {self._run_key, ""}
            if others:
                self._note(f"{self._where} stays: run {min(others)} uses it")
            else:
                self._remove_all()
            self._store.delete(self._closing)
        except FFSplitError as error:  # the artifact stands
            self._note(f"warning: {self._where} was not removed: {error}: ffsplit gc removes it")

    def _begin(self) -> None:
        """Register, and wait for those that are removing this scratch."""
        told = False
        while True:
            self._write(self._key)
            now = self._time_of(self._key)
            closing = [each for each in self._owners() if _name(each).startswith(CLOSING)]
            for each in closing:
                if now - each.modified_at > LEASE:  # it was killed while it was at it
                    self._store.delete(each.key)
            if not [each for each in closing if now - each.modified_at <= LEASE]:
                return
            if not told:
                self._note(f"{self._where}: another run is removing this scratch: waiting for it to end")
                told = True
            time.sleep(LOOK_EVERY_S)

    def _remove_all(self) -> None:
        """Everything but the announcement: until that is gone nobody begins here."""
        for name in self._store.list_directories(self._prefix):
            if name != OWNERS:
                self._store.delete_prefix(f"{self._prefix}/{name}")
        for key in list(self._store.list(self._prefix)):
            if not key.rpartition("/")[2].startswith(CLOSING):
                self._store.delete(key)

    def _keep(self) -> None:
        """Write the owner's record again and again; a store that fails may come back."""
        is_failing = False
        while not self._over.wait(RENEW_EVERY_S):
            try:
                self._write(self._key)
                is_failing = False
            except Exception as error:
                if not is_failing:
                    self._note(f"warning: {self._where}: cannot renew this run's hold on it: {error}")
                is_failing = True

    def _stop_renewing(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _write(self, key: str) -> None:
        """What is in it is for people: the key and the time of writing say all that counts."""
        record = {"run_key": self._run_key, "host": socket.gethostname(), "pid": os.getpid()}
        self._store.put_bytes(key, (json.dumps(record) + "\n").encode())

    def _owners(self) -> list[Stored]:
        return list(self._store.list_details(f"{self._prefix}/{OWNERS}"))

    def _time_of(self, key: str) -> datetime:
        """When the store saw this run's own record written, which is its present."""
        found = {each.key: each.modified_at for each in self._owners()}
        return found.get(key) or datetime.now(timezone.utc)  # a listing may lag behind


def holders(entries: Iterable[Stored], *, now: datetime) -> set[str]:
    """The run keys that hold a scratch, by the files in it; "" where a run is removing it."""
    return {
        "" if _name(each).startswith(CLOSING) else _name(each).partition("-")[0]
        for each in entries
        if each.key.split("/")[2:3] == [OWNERS] and now - each.modified_at <= LEASE
    }


def _name(entry: Stored) -> str:
    return entry.key.rpartition("/")[2]
