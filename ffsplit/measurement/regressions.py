"""Regression gates: limits on how much worse a result may be than the one that is in use.

sts drop <= 0.2 of current            a task of --eval, or one metric as in classification:f1, in its own unit
fidelity drop <= 0.01 of current      or any measure of fidelity by its name; 1% is 0.01
speedup drop <= 5% of current         as a share of the current speed-up, at the worst shape timed for both
size growth <= 2% of current          as a share of the current bytes of all weights

They decide whether a result replaces the current one, not whether it is published: they are no part of a
run's key. A gate on something that was not measured for both, or on other evaluation data, fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ffsplit.config import Record
from ffsplit.errors import ConfigError
from ffsplit.measurement.gates import FIDELITY, HEADLINES, names_score
from ffsplit.store.manifest import GateResult, Latency, Measurements, Spread, TaskScore

ENDING = "of current"
FORMS = (
    "TASK drop <= F of current, fidelity drop <= F of current (or a measure of it by name), "
    "speedup drop <= 5% of current, size growth <= 5% of current"
)
RELATIVE = ("speedup drop", "size growth")

_SPEC = re.compile(
    r"(?P<metric>.+?)\s*(?:<=|=<|≤)\s*(?P<limit>[^%\s]+)\s*(?P<percent>%?)\s+of current", re.DOTALL
)


class RegressionGate(Record):
    """One limit. `metric` ends with ` drop` or ` growth`, as in the module's examples."""

    metric: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} <= {self.limit:.12g} {ENDING}"


def is_regression(spec: str) -> bool:
    """Whether a gate compares with the result in use."""
    return " ".join(spec.split()).endswith(ENDING)


def parse_regression(spec: str) -> RegressionGate:
    """The gate of a SPEC. Raises ConfigError with the problem in one line."""
    match = _SPEC.fullmatch(spec.strip())
    metric = " ".join(match["metric"].split()) if match else ""
    if match is None or not (metric.endswith(" drop") or metric == "size growth"):
        raise ConfigError(f"gate {spec!r}: the forms are {FORMS}")
    try:
        limit = float(match["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit) or limit < 0:
        raise ConfigError(f"gate {spec!r}: {match['limit']!r} is not a number of 0 or more")
    name = metric.removesuffix(" drop")
    if match["percent"]:
        if metric not in RELATIVE and name != "fidelity" and name not in FIDELITY:
            raise ConfigError(f"gate {spec!r}: a task's drop is in its own unit, not in percent")
        limit = float(f"{limit / 100:.12g}")
    return RegressionGate(metric=metric, limit=limit)


def judge_regressions(
    gates: Sequence[RegressionGate], new: Measurements, current: Measurements | None
) -> tuple[GateResult, ...]:
    """The result of each gate, with how much worse the new result is."""
    return tuple(_judge(gate, new, current) for gate in gates)


def _judge(gate: RegressionGate, new: Measurements, current: Measurements | None) -> GateResult:
    if current is None:
        return GateResult(gate=str(gate), figure=None, met=False)
    if gate.metric == "speedup drop" and _timed_on(new) != _timed_on(current):
        return GateResult(gate=str(gate), figure=None, met=False)
    if gate.metric == "speedup drop":
        return _speed_result(gate, new.latency, current.latency)
    figure = _figure(gate.metric, new, current)
    figure = None if figure is None or not math.isfinite(figure) else float(f"{figure:.12g}")
    return GateResult(gate=str(gate), figure=figure, met=figure is not None and figure <= gate.limit)


def _timed_on(measured: Measurements) -> object:
    """The kind of GPU or processor, since speed-ups on two kinds cannot be compared."""
    return measured.hardware.get("gpu" if measured.device.startswith("cuda") else "processor")


def _figure(metric: str, new: Measurements, current: Measurements) -> float | None:
    """How much worse the new result is; negative if it is better, None if they cannot be compared."""
    if metric == "size growth":
        return new.compressed_size.file_bytes / current.compressed_size.file_bytes - 1
    name = metric.removesuffix(" drop")
    if name == "fidelity":
        name = next((each for each in HEADLINES if each in new.fidelity), name)
    if name in FIDELITY:
        if name not in new.fidelity or name not in current.fidelity:
            return None
        lost = current.fidelity[name] - new.fidelity[name]
        return lost if FIDELITY[name] == ">=" else -lost
    return _task_drop(name, new.tasks, current.tasks)


def _task_drop(name: str, new: Sequence[TaskScore], current: Sequence[TaskScore]) -> float | None:
    """The largest drop over the metrics that the gate names; None unless each has its counterpart."""
    task, _, metric = name.partition(":")
    before = {(each.name, each.metric, each.digest): each.compressed for each in current}
    drops = []
    for each in new:
        if not names_score(task, each) or metric not in ("", each.metric):
            continue
        if (each.name, each.metric, each.digest) not in before:
            return None
        lost = before[each.name, each.metric, each.digest] - each.compressed
        worse = {True: lost, False: -lost, None: abs(lost)}
        drops.append(worse[each.higher_is_better])
    return max(drops, default=None)


def _speed_result(gate: RegressionGate, new: Sequence[Latency], current: Sequence[Latency]) -> GateResult:
    """The largest drop over the shapes timed for both, and its range from the confidence intervals.

    If the limit lies inside that range, the gate is undecided.
    """
    before = {(each.batch_size, each.num_tokens): each for each in current}
    pairs = [(each, before[shape]) for each in new if (shape := (each.batch_size, each.num_tokens)) in before]
    if not pairs:
        return GateResult(gate=str(gate), figure=None, met=False)
    figure = max(1 - each.speedup / then.speedup for each, then in pairs)
    ranges = [_range(each.spread, then.spread) for each, then in pairs]
    known = [each for each in ranges if each is not None]
    if len(known) < len(pairs):
        return GateResult(gate=str(gate), figure=figure, met=figure <= gate.limit)
    low, high = max(each[0] for each in known), max(each[1] for each in known)
    met, failed = high <= gate.limit, low > gate.limit
    return GateResult(
        gate=str(gate), figure=figure, met=met, undecided=not (met or failed), low=low, high=high
    )


def _range(new: Spread | None, current: Spread | None) -> tuple[float, float] | None:
    """The smallest and the largest drop that the two confidence intervals allow."""
    if new is None or current is None or None in (new.low, new.high, current.low, current.high):
        return None
    assert new.low is not None and new.high is not None
    assert current.low is not None and current.high is not None
    return 1 - new.high / current.low, 1 - new.low / current.high
