"""Shares of several sources, and of the model itself."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ffsplit.calibration.mixture import (
    Mixture,
    OwnRows,
    Source,
    draw,
    parse_mixture,
    parse_source,
    specs_of,
    without_share,
)
from ffsplit.calibration.sampling import CalibrationSettings
from ffsplit.errors import ConfigError

SETTINGS = CalibrationSettings(samples=1000, max_length=10, max_tokens=1000, held_out=8)


def texts(name: str, number: int) -> list[str]:
    return [f"{name} {index}" for index in range(number)]


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("a.txt", Source("a.txt")),
        ("a.txt:0.5", Source("a.txt", 0.5)),
        ("a.txt:1", Source("a.txt", 1.0)),
        ("s3://bucket/a.txt:.25", Source("s3://bucket/a.txt", 0.25)),
        ("hf:name:config#text@train", Source("hf:name:config#text@train")),
        ("hf:name#text@train:0.25", Source("hf:name#text@train", 0.25)),
        ("self:", Source("self:")),
        ("self:0.5", Source("self:", 0.5)),
        ("self:1", Source("self:", 1.0)),
        ("self:4M", Source("self:", None, 4_000_000)),
        ("self:2.5k", Source("self:", None, 2500)),
        ("self:100000", Source("self:", None, 100_000)),
        ("self:2M:0.5", Source("self:", 0.5, 2_000_000)),
    ],
)
def test_a_source_is_read_with_its_share(given: str, source: Source) -> None:
    assert parse_source(given) == source
    assert without_share(given) == given.removesuffix(":0.5").removesuffix(":1").removesuffix(
        ":0.25"
    ).removesuffix(":.25")


@pytest.mark.parametrize(
    "given", ["self:x", "self:M", "self:0", "self:0K", "self:12.5", "a.txt:1.5", "a.txt:0"]
)
def test_an_impossible_share_or_number_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="--calibration"):
        parse_source(given)


@pytest.mark.parametrize(
    "given", [("a:0.5", "b:0.4"), ("a:0.5",), ("a:0.6", "self:0.6"), ("a:1", "b"), ("self:", "self:2M")]
)
def test_shares_that_do_not_add_up_are_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--calibration"):
        parse_mixture(given, own_share=0.5)


def test_sources_without_a_share_divide_what_is_left() -> None:
    mixture = parse_mixture(("a:0.5", "b", "self:"), own_share=0)
    assert mixture.own_share == pytest.approx(0.25)
    assert mixture.shares == pytest.approx((2 / 3, 1 / 3))


def test_the_recipes_share_holds_only_where_none_is_given() -> None:
    assert parse_mixture(("a", "b"), own_share=0.5) == Mixture(("a", "b"), None, 0.5)
    assert not parse_mixture(("a:1",), own_share=0.5).has_own
    assert not parse_mixture(("a:0.3", "b:0.7"), own_share=0.5).has_own
    assert parse_mixture(("a", "self:"), own_share=0) == Mixture(("a",), None, 0.5, is_named=True)
    assert parse_mixture(("self:",), own_share=0.3) == Mixture((), None, 1.0, is_named=True)


def test_the_sources_that_are_read_have_no_share_and_no_self() -> None:
    assert specs_of(("a.txt:0.5", "self:2M", "b.txt")) == ("a.txt", "b.txt")


def test_rows_are_drawn_by_their_shares_in_every_beginning() -> None:
    mixture = parse_mixture(("a:0.75", "b:0.25"), own_share=0)
    found = draw(mixture, [texts("a", 500), texts("b", 500)], settings=SETTINGS, seed=0, num_validation=4)
    rows = [row.split()[0] for row in found.sample.calibration]
    assert Counter(rows)["a"] == pytest.approx(3 * Counter(rows)["b"], abs=3) and len(rows) > 400
    assert Counter(rows[:20])["b"] == 5
    parts = [set(found.sample.calibration), set(found.sample.held_out), set(found.sample.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert found.own == OwnRows()


def test_the_smallest_source_bounds_a_mixture() -> None:
    mixture = parse_mixture(("a:0.5", "b:0.5"), own_share=0)
    found = draw(mixture, [texts("a", 500), texts("b", 20)], settings=SETTINGS, seed=0, num_validation=0)
    counts = Counter(row.split()[0] for row in found.sample.calibration)
    assert counts["a"] == counts["b"] < 20


def test_the_model_writes_its_share_of_what_is_read() -> None:
    mixture = parse_mixture(("a",), own_share=0.5)
    found = draw(mixture, [texts("a", 500)], settings=SETTINGS, seed=0, num_validation=8)
    assert len(found.sample.calibration) == found.own.calibration == 50  # 1,000 tokens in rows of 10
    assert found.own.validation == len(found.sample.validation) == 8
    assert found.own.held_out == 0


def test_little_text_asks_for_little_of_the_models_own() -> None:
    found = draw(
        parse_mixture(("a",), own_share=0.5), [texts("a", 20)], settings=SETTINGS, seed=0, num_validation=0
    )
    assert found.own.calibration == len(found.sample.calibration) == 18


def test_a_number_of_tokens_is_written_whatever_the_recipe_reads() -> None:
    found = draw(
        parse_mixture(("a", "self:20K"), own_share=0),
        [texts("a", 90)],
        settings=SETTINGS,
        seed=0,
        num_validation=0,
    )
    assert found.own.calibration == 2000
    assert len(found.sample.calibration) == 82


def test_without_any_text_the_model_writes_the_held_out_rows_too() -> None:
    found = draw(parse_mixture(("self:2K",), own_share=0), [], settings=SETTINGS, seed=0, num_validation=3)
    assert found.sample.calibration == found.sample.held_out == ()
    assert found.own == OwnRows(200, 3, 8)


def test_a_share_beside_a_number_of_tokens_needs_enough_text() -> None:
    mixture = parse_mixture(("a:0.5", "self:600"), own_share=0)
    found = draw(mixture, [texts("a", 90)], settings=SETTINGS, seed=0, num_validation=0)
    assert len(found.sample.calibration) == found.own.calibration == 60
    with pytest.raises(ConfigError, match="60 rows") as caught:
        draw(mixture, [texts("a", 40)], settings=SETTINGS, seed=0, num_validation=0)
    advised = re.search(r"give (self:\d+)", str(caught.value))
    assert advised is not None
    mixture = parse_mixture(("a:0.5", advised[1]), own_share=0)
    draw(mixture, [texts("a", 40)], settings=SETTINGS, seed=0, num_validation=0)
