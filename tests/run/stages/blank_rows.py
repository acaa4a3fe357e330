"""Calibration text of which some rows hold no token."""

from __future__ import annotations

import random

from tests.small_jobs import SmallJob


def with_blank_rows(small_job: SmallJob, *, first: int, last: int) -> None:
    """Have a tokenizer find nothing in some rows, by their place in the order that the sample has.

    Of 60 rows the first 6 are held out and the next 40 calibrate; the 8 after those are judged, if any.
    """
    rows = small_job.text.read_text("utf-8").splitlines()
    order = random.Random(0).sample(range(len(rows)), len(rows))
    for number, index in enumerate(order[first:last], start=1):
        rows[index] = "\u200b" * number
    assert len(set(rows)) == len(rows) == 60
    small_job.text.write_text("\n".join(rows), "utf-8")
