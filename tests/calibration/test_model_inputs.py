"""What a reader makes of rows that hold nothing."""

from __future__ import annotations

import json
from pathlib import Path

from ffsplit.calibration.readers import make_reader
from ffsplit.models.checkpoint import open_checkpoint
from tests.tiny_families import save_checkpoint


def test_a_pair_whose_source_is_empty_is_left_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, "t5", "ForConditionalGeneration"))
    reader = make_reader(checkpoint, max_length=16, batch_tokens=64)
    rows = [json.dumps(pair) for pair in (("one two", "the"), ("", "of"), ("to", "and in"))]
    encoded = reader.encode(rows)
    assert encoded == reader.encode([rows[0], rows[2]]) and len(encoded) == 2
    assert [batch.num_rows for batch in reader.batches(encoded)] == [2]
