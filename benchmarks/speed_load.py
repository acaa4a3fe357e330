"""Whether a machine is quiet enough to time on, and what else ran on it meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
MOST_LOAD = 1.0
"""A page is made only if the load average over one minute is below this when it is started."""


def quiet_load() -> float:
    """The load average. Exits with one line if it is too high to make a page."""
    load = os.getloadavg()[0]
    if load >= MOST_LOAD:
        raise SystemExit(
            f"load average {load:.1f}: a page is made only below {MOST_LOAD:g}, since other work slows some "
            "candidates more than others: wait until the machine is idle, or try it with --quick"
        )
    return load


class Others:
    """CPUs that other processes use from now on."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.perf_counter(), _busy_s(), _own_s()

    def mean_cpus(self) -> float:
        """The mean since the start, in CPUs."""
        wall = time.perf_counter() - self._started
        others = (_busy_s() - self._busy) - (_own_s() - self._own)
        return others / wall if others > 0 else 0.0 * others


def _busy_s() -> float:
    """Seconds that all CPUs have worked; NaN where the system does not tell."""
    if not STAT.is_file():
        return float("nan")
    user, nice, system, _idle, _iowait, *interrupts = map(int, STAT.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Seconds that this process and its children have worked."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
