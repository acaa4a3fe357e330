"""What workers and drivers said of their work, read from their structured logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Event(NamedTuple):
    time: str
    name: str
    stage: str
    item: str
    pid: int


@dataclass
class Events:
    """The lines written since this was made: workers' files of a Ray session, and those of drivers."""

    session: Path
    drivers: tuple[Path, ...]
    _read_to: dict[Path, int] = field(default_factory=dict)
    _found: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read_to = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return [*self.session.glob("worker*.err"), *(path for path in self.drivers if path.exists())]

    def read(self) -> list[Event]:
        """All events so far, in the order of their times."""
        for path in self._files():
            start = self._read_to.get(path, 0)
            if path.stat().st_size > start:
                with path.open("rb") as file:
                    file.seek(start)
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self._read_to[path] = start + len(whole)
                self._found += [event for line in whole.splitlines() if (event := _parse(line))]
        return sorted(self._found)


def _parse(line: bytes) -> Event | None:
    if not line.startswith(b'{"time"'):
        return None
    fields = json.loads(line)
    stage, item = fields.get("stage") or "", fields.get("item") or ""
    return Event(fields["time"], fields["event"], stage, item, int(fields["pid"]))


def recomputed(events: Sequence[Event]) -> list[str]:
    """The items that were begun once more after they had been finished."""
    finished: set[tuple[str, str]] = set()
    again = []
    for event in events:
        key = (event.stage, event.item)
        if event.name == "finished":
            finished.add(key)
        elif event.name == "started" and key in finished:
            again.append(f"{event.stage}/{event.item}")
    return again
