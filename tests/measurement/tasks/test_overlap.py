"""What is counted as seen in calibration."""

from __future__ import annotations

from ffsplit.measurement.tasks.evaluations import count_overlap

CALIBRATION = ["A man is  eating.", "One thing here. Another thing came after it.\nThe third of these lines"]


def test_distinct_sentences_that_are_a_row_or_in_one() -> None:
    texts = ["a man is eating.", "A man is eating.", "Another thing came\nafter it.", "A man", "unseen"]
    assert count_overlap(texts, CALIBRATION, running=False) == 2
    assert count_overlap(texts, [], running=False) == 0
    assert count_overlap([], CALIBRATION, running=False) == 0


def test_running_text_is_compared_by_sentence() -> None:
    text = "Before. A man is eating. Not seen at all here! One thing here.\nThe third of these lines"
    assert count_overlap([text], CALIBRATION, running=True) == 2  # "One thing here." is too short to tell
    assert count_overlap([text], CALIBRATION, running=False) == 0
