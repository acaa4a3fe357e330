"""Rows know where they are; the tests of sources and tasks go through every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.calibration.sources import decoded, lines, table_rows
from ffsplit.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "text", "columns", "expected"),
    [
        ("a.jsonl", '{"a": 1}\r\n\r\n{"a": "\u2028"}\n', ["a"], {1: [1], 3: ["\u2028"]}),
        ("a.csv", '"a\nb",1\n\nc,2\n', [], {2: ["a\nb", "1"], 4: ["c", "2"]}),
        ("a.csv", "a,b\nc,d\n", ["1", "0"], {1: ["b", "a"], 2: ["d", "c"]}),
        ("a.csv", "a,b\nc,d\n", ["1", "a"], {2: ["d", "c"]}),
        ("a.tsv", '"a\t1\n', [], {1: ['"a', "1"]}),
    ],
)
def test_rows_know_their_last_line(
    tmp_path: Path, name: str, text: str, columns: list[str], expected: dict[int, list[object]]
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    found = list(table_rows(str(path), path, columns))
    assert found == [(f"{path}:{line}", cells) for line, cells in expected.items()]


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not a JSON object"):
        list(table_rows(str(path), path, ["a"]))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert list(lines(decoded(str(path), path))) == ["one\n", "two"]
