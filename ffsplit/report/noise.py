"""How far timings can be trusted, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ffsplit.artifacts.manifest import Latency, LoadAverage, Spread
from ffsplit.report.humanize import number, shape, times

NOISY_TAIL: Final = 1.5
"""p95 over p50 beyond which timings are called noisy."""


def spread_in_words(of: Spread | None) -> str:
    """The 10th to the 90th percentile of single pairs, empty where it was not recorded."""
    return "" if of is None else f"{number(of.p10)} to {times(of.p90)}"


def noise(latency: Sequence[Latency], load: LoadAverage | None) -> str | None:
    """What disturbed the timings, in one line; None where nothing shows that anything did."""
    tails = {
        f"at {shape(each.batch_size, num_tokens=each.num_tokens)} tokens the {name}'s": p95 / p50
        for each in latency
        for name, p50, p95 in (
            ("original", each.original_p50_ms, each.original_p95_ms),
            ("compressed model", each.compressed_p50_ms, each.compressed_p95_ms),
        )
    }
    return described(tails, load)


def described(tails: dict[str, float], load: LoadAverage | None) -> str | None:
    """The longest tail (p95 / p50 by whose it is), and a load that the CPUs could not carry."""
    said = list(_disturbances(tails, load))
    return f"timings are noisy: {'; '.join(said)}" if said else None


def _disturbances(tails: dict[str, float], load: LoadAverage | None) -> Iterator[str]:
    whose, longest = max(tails.items(), key=lambda tail: tail[1], default=("", 0.0))
    if longest > NOISY_TAIL:
        yield f"{whose} p95 is {number(longest)} times its p50"
    if load is not None and max(load.before, load.after) > load.num_cpus:
        yield f"more ran than the CPUs could carry, {load_in_words(load)}"


def load_in_words(load: LoadAverage) -> str:
    cpus = f"{load.num_cpus} CPU{'' if load.num_cpus == 1 else 's'}"
    return f"load average {load.before:.2f} before and {load.after:.2f} after, on {cpus}"
