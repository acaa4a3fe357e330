"""What a sample keeps: every text in one part at most, nothing lost, the same bytes each time."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.calibration.sampling import TextSample, passages, sample_texts, shard
from ffsplit.errors import ConfigError

TEXTS = [f"text {number}" for number in range(100)]
lists_of_texts = st.lists(st.text(alphabet="ab é\n\u3000", min_size=1, max_size=40), max_size=30)


def without_space(texts: list[str]) -> str:
    return "".join("".join(texts).split())


@given(texts=lists_of_texts, max_characters=st.integers(1, 50))
def test_passages_lose_nothing_but_white_space(texts: list[str], max_characters: int) -> None:
    assert without_space(passages(texts, max_characters=max_characters)) == without_space(texts)


@given(texts=lists_of_texts, max_characters=st.integers(1, 50))
def test_every_passage_but_the_last_is_full_and_none_is_over_twice_full(
    texts: list[str], max_characters: int
) -> None:
    *full, last = passages(texts, max_characters=max_characters) or [""]
    assert all(max_characters <= len(passage) <= 2 * max_characters for passage in full)
    assert len(last) <= 2 * max_characters


def test_passages_join_consecutive_texts_with_newlines() -> None:
    assert passages(["aa", "bb", "cc", "dd", "e"], max_characters=5) == ["aa\nbb", "cc\ndd", "e"]


def test_a_long_text_is_cut_at_white_space() -> None:
    assert passages(["one two three four"], max_characters=5) == ["one two", "three", "four"]


def test_a_text_of_exactly_the_limit_is_one_passage() -> None:
    assert passages(["a b c", "d e f"], max_characters=5) == ["a b c", "d e f"]


def test_a_text_without_white_space_is_cut_at_the_limit() -> None:
    assert passages(["字" * 25], max_characters=10) == ["字" * 10, "字" * 15]


def test_the_rest_of_a_long_text_begins_the_next_passage() -> None:
    assert passages(["aaa bbb c", "dd"], max_characters=4) == ["aaa bbb", "c\ndd"]


def test_no_texts_give_no_passages() -> None:
    assert passages([], max_characters=10) == []


def test_a_long_text_is_cut_in_linear_time() -> None:
    text = "word " * 400_000
    assert sum(map(len, passages([text], max_characters=100))) > 1_500_000


@given(
    texts=st.lists(st.text(max_size=5), min_size=1, max_size=60),
    num_samples=st.integers(1, 80),
    num_held_out=st.integers(1, 20),
    seed=st.integers(0, 2**40),
)
def test_a_sample_is_a_split_of_the_distinct_texts(
    texts: list[str], num_samples: int, num_held_out: int, seed: int
) -> None:
    sample = sample_texts(texts, num_samples=num_samples, num_held_out=num_held_out, seed=seed)
    distinct = set(texts)
    calibration, held_out = set(sample.calibration), set(sample.held_out)
    assert calibration <= distinct and held_out <= distinct
    assert len(calibration) == len(sample.calibration) and len(held_out) == len(sample.held_out)
    if len(distinct) == 1:
        assert calibration == held_out == distinct
        assert not sample.held_out_is_disjoint
        return
    assert sample.held_out_is_disjoint
    assert not calibration & held_out
    assert len(held_out) == min(num_held_out, max(1, len(distinct) // 10))
    assert len(calibration) == min(num_samples, len(distinct) - len(held_out))


def test_the_same_arguments_give_the_same_sample_whatever_the_duplicates() -> None:
    once = sample_texts(TEXTS, num_samples=20, num_held_out=5, seed=7)
    assert sample_texts(TEXTS + TEXTS[::-1], num_samples=20, num_held_out=5, seed=7) == once
    assert sample_texts(TEXTS, num_samples=20, num_held_out=5, seed=8).digest != once.digest


def test_the_sample_is_the_same_on_every_platform() -> None:
    sample = sample_texts(TEXTS, num_samples=4, num_held_out=2, seed=0)
    assert sample.held_out == ("text 49", "text 97")
    assert sample.calibration == ("text 53", "text 5", "text 33", "text 65")


def test_held_out_does_not_depend_on_num_samples_and_samples_are_nested() -> None:
    small = sample_texts(TEXTS, num_samples=10, num_held_out=5, seed=3)
    large = sample_texts(TEXTS, num_samples=50, num_held_out=5, seed=3)
    assert large.held_out == small.held_out
    assert large.calibration[:10] == small.calibration


def test_both_parts_are_shuffled() -> None:
    sample = sample_texts(TEXTS, num_samples=100, num_held_out=10, seed=0)
    assert list(sample.calibration) != sorted(sample.calibration, key=TEXTS.index)
    assert list(sample.held_out) != sorted(sample.held_out, key=TEXTS.index)


def digest_of_groups(*groups: list[str]) -> str:
    """The digest as its docstring states it."""
    data = b""
    for group in groups:
        data += len(group).to_bytes(8, "big")
        data += b"".join(len(text.encode()).to_bytes(8, "big") + text.encode() for text in group)
    return hashlib.sha256(data).hexdigest()


def test_the_digest_covers_both_lists_with_their_lengths() -> None:
    sample = sample_texts(["é", "b", "c"], num_samples=2, num_held_out=1, seed=0)
    assert sample.digest == digest_of_groups(list(sample.calibration), list(sample.held_out))


@pytest.mark.parametrize("num_validation", [0, 5])
def test_the_first_rows_of_a_sample_are_the_smaller_sample(num_validation: int) -> None:
    large, small = (
        sample_texts(TEXTS, num_samples=count, num_held_out=5, seed=3, num_validation=num_validation)
        for count in (20, 8)
    )
    first = large.first(8, held_out=5, validation=5)
    assert first.calibration == small.calibration
    assert (first.held_out, first.validation) == (large.held_out, large.validation)
    assert first.digest not in (
        large.digest,
        sample_texts(TEXTS, num_samples=8, num_held_out=4, seed=3).digest,
    )
    if not num_validation:
        assert first == small


def test_a_sample_is_frozen() -> None:
    sample = TextSample(("a",), ("b",), True, "0" * 64)
    with pytest.raises(AttributeError):
        sample.digest = ""  # type: ignore[misc]


def test_no_text_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="no text to sample: name a calibration source"):
        sample_texts([], num_samples=1, num_held_out=1, seed=0)


@given(rows=st.lists(st.text(max_size=3), max_size=20), shard_size=st.integers(1, 25))
def test_shards_are_full_but_the_last_and_keep_every_row_in_order(rows: list[str], shard_size: int) -> None:
    shards = shard(rows, shard_size=shard_size)
    assert [row for part in shards for row in part] == rows
    assert all(len(part) == shard_size for part in shards[:-1])
    assert all(1 <= len(part) <= shard_size for part in shards[-1:])


@given(
    count=st.integers(3, 100),
    samples=st.integers(1, 60),
    held_out=st.integers(1, 30),
    validation=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_rows_to_judge_on_are_apart_and_change_no_other_choice(
    count: int, samples: int, held_out: int, validation: int, seed: int
) -> None:
    plain = sample_texts(TEXTS[:count], num_samples=samples, num_held_out=held_out, seed=seed)
    sample = sample_texts(
        TEXTS[:count], num_samples=samples, num_held_out=held_out, seed=seed, num_validation=validation
    )
    groups = (sample.calibration, sample.held_out, sample.validation)
    assert all(groups) and len(set().union(*groups)) == sum(map(len, groups))
    assert sample.held_out == plain.held_out
    assert sample.calibration == plain.calibration[: len(sample.calibration)]
    assert len(sample.calibration) >= 0.9 * len(plain.calibration) - 1
    assert len(sample.validation) <= validation
    assert sample.digest != plain.digest


def test_too_few_rows_to_judge_on() -> None:
    with pytest.raises(ConfigError, match="rows to choose by"):
        sample_texts(TEXTS[:2], num_samples=5, num_held_out=1, seed=0, num_validation=1)
