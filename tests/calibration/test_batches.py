"""Rows become batches that hold every token once and mark every padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.calibration.model_inputs import num_rows_within, padded_batches, tokenize_rows
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_tokenizer

rows_of_ids = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), min_size=1, max_size=40)


@given(rows=rows_of_ids, batch_tokens=st.integers(1, 200))
def test_every_row_is_in_one_batch_and_padding_is_masked(rows: list[list[int]], batch_tokens: int) -> None:
    batches = list(padded_batches(rows, batch_tokens=batch_tokens, pad_id=0))
    found = []
    for batch in batches:
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert torch.equal(batch.input_ids != 0, batch.attention_mask.bool())
        found += [
            ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
    assert sorted(found) == sorted(rows)
    assert found == sorted(rows, key=len, reverse=True)
    assert sum(batch.num_tokens for batch in batches) == sum(map(len, rows))


@given(rows=rows_of_ids, batch_tokens=st.integers(1, 200))
def test_a_batch_is_within_its_tokens_or_a_single_row(rows: list[list[int]], batch_tokens: int) -> None:
    batches = list(padded_batches(rows, batch_tokens=batch_tokens, pad_id=0))
    assert all(batch.input_ids.numel() <= batch_tokens or len(batch.input_ids) == 1 for batch in batches)
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


def test_the_padding_is_on_the_right_and_of_the_given_id() -> None:
    (batch,) = padded_batches([[5, 6], [7, 8, 9]], batch_tokens=6, pad_id=42)
    assert batch.input_ids.tolist() == [[7, 8, 9], [5, 6, 42]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.num_tokens == 5


def test_no_rows_give_no_batches() -> None:
    assert list(padded_batches([], batch_tokens=8, pad_id=0)) == []


@pytest.fixture(scope="module")
def tokenizer(checkpoint_of):  # type: ignore[no-untyped-def]
    directory: Path = checkpoint_of("bert")
    return load_tokenizer(open_checkpoint(directory))


def test_rows_are_cut_and_keep_their_order(tokenizer) -> None:  # type: ignore[no-untyped-def]
    rows = tokenize_rows(tokenizer, ["the new people", "such " * 50], max_length=10)
    assert [len(row) for row in rows] == [5, 10]
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == "the new people"


def test_rows_of_special_tokens_alone_are_left_out(tokenizer) -> None:  # type: ignore[no-untyped-def]
    rows = tokenize_rows(tokenizer, ["", "[PAD] [PAD]", "people", "\u4e2d"], max_length=10)
    assert len(rows) == 1
    assert tokenize_rows(tokenizer, ["the new people"], max_length=2) == []


@pytest.mark.parametrize(
    ("max_tokens", "num_rows"), [(1, 1), (5, 1), (14, 1), (15, 2), (19, 2), (20, 3), (99, 3)]
)
def test_as_many_rows_as_the_tokens_have_room_for(tokenizer, max_tokens: int, num_rows: int) -> None:  # type: ignore[no-untyped-def]
    rows = ["the new people", "such " * 50, "the new people"]  # of 5, 10 and 5 tokens
    assert num_rows_within(tokenizer, rows, max_length=10, max_tokens=max_tokens) == num_rows
