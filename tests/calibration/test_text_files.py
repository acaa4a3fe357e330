"""Records and rows know where they are; other readers' tests go through every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.calibration.sources import DIALECTS, decoded, delimited_rows, json_records, lines
from ffsplit.errors import ConfigError

PATH = Path("a.jsonl")


def test_json_records_know_their_line() -> None:
    found = list(json_records('{"a": 1}\r\n\r\n{"a": "\u2028"}\n', PATH))
    assert found == [("a.jsonl:1", {"a": 1}), ("a.jsonl:3", {"a": "\u2028"})]


def test_a_line_that_is_no_object() -> None:
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not a JSON object"):
        list(json_records('{"a": 1}\n[1]\n', PATH))


def test_rows_know_their_last_line() -> None:
    rows = delimited_rows('"a\nb",1\n\nc,2\n', PATH, dialect=DIALECTS[".csv"])
    assert rows == [(2, ["a\nb", "1"]), (4, ["c", "2"])]
    assert delimited_rows('"a\t1\n', PATH, dialect=DIALECTS[".tsv"]) == [(1, ['"a', "1"])]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert list(lines(decoded(str(path), path))) == ["one\n", "two"]
