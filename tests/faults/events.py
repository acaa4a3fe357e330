"""What workers and drivers said of their work, read from their structured logs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Event(NamedTuple):
    time: str
    name: str
    stage: str
    item: str
    pid: int
    run: str


@dataclass
class Events:
    """The lines written since this was made: workers' files of a Ray session, and those of drivers."""

    session: Path
    drivers: tuple[Path, ...]
    _read_to: dict[int, int] = field(default_factory=dict)
    """By the files themselves: Ray renames that of a worker which it gives to a job."""
    _found: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in self._files():
            with suppress(FileNotFoundError):
                found = path.stat()
                self._read_to[found.st_ino] = found.st_size

    def _files(self) -> list[Path]:
        """Ray moves the files of dead workers to `old` once there are a thousand."""
        return [*self.session.glob("worker*.err"), *self.session.glob("old/worker*.err"), *self.drivers]

    def read(self) -> list[Event]:
        """All events so far, in the order of their times."""
        for path in self._files():
            with suppress(FileNotFoundError), path.open("rb") as file:
                found = os.fstat(file.fileno())
                start = self._read_to.get(found.st_ino, 0)
                if found.st_size > start:
                    file.seek(start)
                    data = file.read()
                    whole = data[: data.rfind(b"\n") + 1]
                    self._read_to[found.st_ino] = start + len(whole)
                    self._found += [event for line in whole.splitlines() if (event := _parse(line))]
        return sorted(self._found)


def _parse(line: bytes) -> Event | None:
    if not line.startswith(b'{"time"'):
        return None
    fields = json.loads(line)
    stage, item = fields.get("stage") or "", fields.get("item") or ""
    return Event(fields["time"], fields["event"], stage, item, int(fields["pid"]), fields.get("run") or "")


def recomputed(events: Sequence[Event]) -> list[str]:
    """The items that were begun once more after they had been finished."""
    finished: set[tuple[str, str, str]] = set()
    again = []
    for event in events:
        key = (event.run, event.stage, event.item)
        if event.name == "finished":
            finished.add(key)
        elif event.name == "started" and key in finished:
            again.append(f"{event.stage}/{event.item}")
    return again
