"""Rows are read the same from every kind of file, and a row that does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.errors import ConfigError
from ffsplit.measurement.tasks.base import TABLES, read_rows, task_file

NAMES = ("text", "label")


def cells(path: Path, content: str, columns: str = "") -> list[tuple[str, ...]]:
    path.write_bytes(content.encode())
    file = task_file(f"task:{path}{columns}", suffixes=TABLES)
    return [row.cells for row in read_rows(file, names=NAMES, is_value=str.isdigit)]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", 'one two,0\n"three, four",1\n', ""),
        ("a.csv", 'text,label\none two,0\n"three, four",1\n', ""),
        ("a.csv", 'sentence,gold\r\none two,0\r\n"three, four",1\r\n', "#0,1"),
        ("a.CSV", 'id,label,text\n7,0,one two\n8,1,"three, four"\n', "#text,label"),
        ("a.csv", 'id,label,text\n7,0,one two\n8,1,"three, four"\n', "#2,label"),
        ("a.tsv", "one two \t0\nthree, four\t 1\n", ""),
        ("a.tsv", "\ufefftext\tlabel\none two\t0\n\nthree, four\t1\n", ""),
        ("a.jsonl", '{"text": "one two", "label": 0}\n\n{"text": "three, four", "label": "1"}\n', ""),
        ("a.jsonl", '{"a": "one two", "b": 0.0}\n{"a": "three, four", "b": 1}\n', "#a,b"),
    ],
)
def test_the_same_rows_from_every_form(tmp_path: Path, name: str, content: str, columns: str) -> None:
    assert cells(tmp_path / name, content, columns) == [("one two", "0"), ("three, four", "1")]


def test_a_hash_in_a_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "a#b"
    folder.mkdir()
    assert cells(folder / "a.csv", "one two,0\n", "#0,1") == [("one two", "0")]


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\ntwo",0\nthree,1\n')
    rows = read_rows(task_file(f"task:{path}", suffixes=TABLES), names=NAMES, is_value=str.isdigit)
    assert [row.where for row in rows] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "", "", "the file is empty"),
        ("a.csv", "text,label\n", "", "the file has no rows"),
        ("a.csv", "a b,0\nc d\n", "", r"a\.csv:2: expected 2 columns \(text, label\), found 1"),
        ("a.csv", "a,b,0\n", "", "expected 2 columns"),
        ("a.csv", "text,label\na b,0\nc d\n", "#text,label", r"a\.csv:3: the row has 1 column\(s\), not 2"),
        ("a.csv", "text,label\na b,0\n", "#text,gold", "there is no column 'gold'"),
        ("a.csv", "text,label\na b,0\n", "#text,2", "no column 2"),
        ("a.csv", "text,label\na b,0\n", "#text", "name 2 columns after #: text,label"),
        ("a.csv", "text,label\na b,0\n", "#", "name 2 columns after #: text,label"),
        ("a.csv", "a b,0\n ,1\n", "", r"a\.csv:2: the text is empty"),
        ("a.csv", 'a b,0\n"c,1\n', "", "mend its quotes"),
        ("a.jsonl", '{"text": "a"}\n', "", "there is no field 'label'"),
        ("a.jsonl", '{"text": 3, "label": 0}\n', "", "field 'text' is int, not a string"),
        ("a.jsonl", '{"text": "a", "label": true}\n', "", "field 'label' is bool"),
        ("a.jsonl", '{"text": "a", "label": 0}\nnonsense\n', "", r"a\.jsonl:2: invalid JSON"),
        ("a.txt", "a b\n", "", r"needs a file that ends in \.csv or \.tsv or \.jsonl"),
        ("a", "a b\n", "", "needs a file"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, name: str, content: str, columns: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cells(tmp_path / name, content, columns)
    assert "\n" not in str(caught.value)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,text,label\na,b,1\n")
    with pytest.raises(ConfigError, match="2 columns are named 'text'; rename all but one"):
        read_rows(task_file(f"x:{path}#text,label", suffixes=TABLES), names=("text", "label"), is_value=bool)
    file = task_file(f"x:{path}#1,label", suffixes=TABLES)
    assert [row.cells for row in read_rows(file, names=("text", "label"), is_value=bool)] == [("b", "1")]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        task_file(f"task:{tmp_path}/none.csv", suffixes=TABLES)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        task_file(f"task:{tmp_path}/folder.csv", suffixes=TABLES)
    with pytest.raises(ConfigError, match="needs a file"):
        task_file("task:", suffixes=TABLES)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"one,0\ntw\xff,1\n")
    with pytest.raises(ConfigError, match=r"a\.csv:2: byte 0xff is not UTF-8"):
        read_rows(task_file(f"task:{path}", suffixes=TABLES), names=NAMES, is_value=str.isdigit)
