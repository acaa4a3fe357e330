"""What the fast set has of a matrix, and which tests go to one process."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.fast_set import covering, group_of

AXES = (("a", "b", "c", "d"), (1, 2, 3), (True, False))
CASES = [list(zip("xyz", case, strict=True)) for case in product(*AXES)]


@pytest.mark.parametrize(("strength", "fewest"), [(1, 4), (2, 12)])
def test_every_value_or_every_pair_of_values_is_met_by_few_cases(strength: int, fewest: int) -> None:
    covers = [frozenset(combinations(case, strength)) for case in CASES]
    chosen = covering(covers)
    assert frozenset().union(*(covers[index] for index in chosen)) == frozenset().union(*covers)
    assert fewest <= len(chosen) <= fewest + 2 < len(CASES)
    assert chosen == covering(covers), "every process chooses the same"


def test_a_case_alone_is_kept() -> None:
    assert covering([frozenset({("x", 1)})]) == [0]


def test_what_shares_a_cluster_goes_to_one_process() -> None:
    names = ("jobs/test_stop", "jobs/test_submit", "zoo/test_run")
    assert {group_of(f"tests/{name}.py::test_it[a/b::c]") for name in names} == {"ray"}
    assert group_of("tests/store/test_s3.py::test_a") == "tests/store/test_s3.py"
    assert group_of("tests/s3/test_races.py::test_a") == "s3"
