"""The fast set, which `make test` runs: all tests but those marked `slow`. `make test-all` runs every one.

Marks that a fixture implies are set here, a `matrix` keeps enough cases to meet every value, and tests that
share a server or a session's models go to one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

IMPLIED = {"s3_endpoint": "s3", "cluster": "ray", "local_ray": "ray"}
"""The mark of a test by the fixture that it uses."""
TOGETHER = {"jobs": "ray", "faults": "ray", "distributed": "ray", "zoo": "ray", "s3": "s3"}
"""Folders whose tests run in one process: two clusters at once are too much for two cores, and servers are
started once, on fixed ports."""


def arrange(items: list[pytest.Item]) -> None:
    """Mark the tests and put them in the order that keeps several processes busy."""
    matrices: dict[tuple[Path, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        for fixture, mark in IMPLIED.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)
        if item.get_closest_marker("matrix"):
            assert isinstance(item, pytest.Function)
            matrices[item.path, item.originalname].append(item)
    for cases in matrices.values():
        fast = kept(cases)
        for case in cases:
            if case not in fast:
                case.add_marker(pytest.mark.slow)
    long = {group_of(item.nodeid) for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: group_of(item.nodeid) not in long)  # a cluster that starts last is waited for


def group_of(nodeid: str) -> str:
    """What goes to one process together: a file of tests, or a folder of them."""
    path = PurePosixPath(nodeid.partition("::")[0])
    return next((TOGETHER[name] for name in path.parts[:-1] if name in TOGETHER), str(path))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's `loadfile`, by these groups. (Its `loadgroup` does nothing with pytest 9.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def kept(cases: Sequence[pytest.Function]) -> list[pytest.Function]:
    """The cases of a matrix that the fast set has.

    `matrix()` meets every value of every argument, `matrix(pairs=True)` every pair of values of two, and
    `matrix(family=("bert", "llama"))` is of these values alone.
    """
    mark = cases[0].get_closest_marker("matrix")
    assert mark is not None
    only = {name: values for name, values in mark.kwargs.items() if name != "pairs"}
    wanted = [
        case for case in cases if all(case.callspec.params[name] in values for name, values in only.items())
    ]
    for name, values in only.items():
        missing = set(values) - {case.callspec.params[name] for case in wanted}
        assert not missing, f"{cases[0].nodeid}: no case has {name} = {missing}"
    strength = 2 if mark.kwargs.get("pairs") else 1
    covers = [frozenset(combinations(_places(case), strength)) for case in wanted]
    chosen = covering(covers)
    return [wanted[index] for index in chosen]


def _places(case: pytest.Function) -> list[tuple[str, Any]]:
    """A case's arguments with their values, or how those are written that have no hash."""
    values = sorted(case.callspec.params.items())
    return [(name, value if isinstance(value, Hashable) else repr(value)) for name, value in values]


def covering(covers: Sequence[frozenset[Any]]) -> list[int]:
    """Indices of sets that together hold whatever all of them hold, each time the one that adds most."""
    left = set(_union(covers))
    chosen: list[int] = []
    while left:
        best = max(range(len(covers)), key=lambda index: (len(covers[index] & left), -index))
        chosen.append(best)
        left -= covers[best]
    return chosen


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset().union(*sets)
