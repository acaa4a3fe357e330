"""The quality benchmark's grid: which cell runs when, where, and what a failure leaves."""

from __future__ import annotations

import os
import time

import pytest

from benchmarks.quality_grid import Host, cards_here, run_grid


def square(number: int) -> int:
    if number < 0:
        raise ValueError("no negative number")
    if number == 99:
        os._exit(3)
    time.sleep(0.01)
    return number * number


def card_of(_: int) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.subprocess
def test_a_grid_goes_on_after_a_cell_that_fails_and_one_that_ends_its_process() -> None:
    ended = {each.cell: each for each in run_grid([3, -1, 99, 4], square, host=Host(1, 0))}
    assert {cell: each.result for cell, each in ended.items()} == {3: 9, -1: None, 99: None, 4: 16}
    assert ended[-1].error == "ValueError: no negative number"
    assert "ended with code 3" in ended[99].error


@pytest.mark.subprocess
def test_every_process_has_a_card_of_its_own() -> None:
    ended = list(run_grid([0, 1], card_of, host=Host(2, 0, cards=("2", "5"))))
    assert {each.result for each in ended} == {"2", "5"}


@pytest.mark.subprocess
def test_no_cell_is_begun_that_would_not_end_in_time() -> None:
    ends_at = time.monotonic() + 500
    expected = {1: 400.0, 2: 600.0, 3: 100.0}
    ended = list(
        run_grid([1, 2, 3], square, host=Host(1, 0), expected_s=expected.__getitem__, ends_at=ends_at)
    )
    assert [each.cell for each in ended] == [1, 3]


@pytest.mark.subprocess
def test_a_cell_that_takes_longer_is_stopped() -> None:
    begun = time.monotonic()
    assert list(run_grid([60.0], time.sleep, host=Host(1, 0), ends_at=begun + 1)) == []
    assert time.monotonic() - begun < 30


def test_more_cards_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert cards_here(None) == ("4", "6") and cards_here(1) == ("4",)
    with pytest.raises(ValueError, match="--cards 3: this machine has 2"):
        cards_here(3)
