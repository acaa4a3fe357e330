"""A run in a process of its own, watched: the most bytes that it had in each place, and in memory.

`python -m tests.run.watched CONFIG.json` prints them as JSON, with what pre-flight foresaw. Samples are
taken all the time, and just before anything is removed or renamed, when the most is there.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

SAMPLE_S = 0.1
MOMENTS = ("os.remove", "os.rename", "shutil.rmtree", "os.rmdir")


class Watch:
    """The most bytes that were below each directory at once; files without a name count as TMPDIR's."""

    def __init__(self, places: dict[str, Path]) -> None:
        self._places, self.peaks = places, dict.fromkeys(places, 0)
        self._ends, self._busy = threading.Event(), threading.local()

    def __enter__(self) -> Watch:
        sys.addaudithook(self._hear)
        self._thread = threading.Thread(target=self._keep_looking)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _hear(self, event: str, _: tuple[Any, ...]) -> None:
        if event in MOMENTS and not self._ends.is_set() and not getattr(self._busy, "now", False):
            self._busy.now = True
            try:
                self.look()
            finally:
                self._busy.now = False

    def _keep_looking(self) -> None:
        while not self._ends.wait(SAMPLE_S):
            self.look()

    def look(self) -> None:
        for name, place in self._places.items():
            found = _bytes_below(place) + (_unnamed_bytes(place) if name == "temporary" else 0)
            self.peaks[name] = max(self.peaks[name], found)


def _bytes_below(place: Path) -> int:
    found = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                found += os.lstat(f"{folder}/{name}").st_blocks * 512
            except OSError:  # removed meanwhile
                continue
    return found


def _unnamed_bytes(place: Path) -> int:
    """Of files that are mapped and were removed: the hidden states of a model that goes block by block."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines if f" {place}/" in line and "(deleted)" in line)
    return sum(int(stop, 16) - int(start, 16) for start, stop in ranges)


def peak_memory_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main(path: str) -> None:
    fields = json.loads(Path(path).read_text())
    places = {"temporary": Path(tempfile.gettempdir()), "cache": Path(os.environ["FFSPLIT_CACHE"])}
    if "://" not in fields["out"]:
        places["store"] = Path(fields["out"])
    import ffsplit
    from ffsplit.config import JobConfig
    from tests.small_jobs import needs_of

    config = JobConfig(**fields)
    needs = needs_of(config)
    with Watch(places) as watch:
        ffsplit.compress(config)
        watch.look()
    foreseen = {
        "temporary": needs.temporary.needed_bytes,
        "store": needs.store.needed_bytes,
        "cache": needs.cache.needed_bytes,
        "memory": needs.totals.memory_bytes,
    }
    print(json.dumps({"foreseen": foreseen, "peaks": watch.peaks | {"memory": peak_memory_bytes()}}))


if __name__ == "__main__":
    main(sys.argv[1])
