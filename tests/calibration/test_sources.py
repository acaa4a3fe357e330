"""Every form of a source gives its texts in order; every mistake gives one clear line."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ffsplit.calibration.sources import FORMS, read_all, read_texts
from ffsplit.errors import ConfigError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def error_of(spec: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read_texts(str(spec))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.args == (message,)
    return message.removeprefix("cannot read texts from ")


# ---- what is read --------------------------------------------------------------------------------

TWO = ["first text", "second, “text”"]


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.txt", "first text\n\n  second, “text” \r\n", ""),
        ("a.TXT", "first text\rsecond, “text”", ""),
        ("bom.txt", "\ufefffirst text\nsecond, “text”", ""),
        ("a.jsonl", '{"t": "first text"}\n\n{"n": 1, "t": "second, \\u201ctext”"}\n', "#t"),
        ("a.csv", 'n,t\n1,first text\n\n2,"second, “text”"\n', "#t"),
        ("a.csv", 'first text,1\r\n"second, “text”",2\r\n', "#0"),
        ("bom.csv", '\ufefft,n\nfirst text,1\n"second, “text”",2\n', "#t"),
        ("a.tsv", "n\tt\n1\tfirst text\n2\tsecond, “text”\n", "#t"),
        ("a.tsv", "1\tfirst text\n2\tsecond, “text”\n", "#1"),
        ("hash#1.csv", 'n,a#b\n1,first text\n2,"second, “text”"\n', "#a#b"),
    ],
)
def test_each_text_form(tmp_path: Path, name: str, content: str, column: str) -> None:
    assert read_texts(f"{write(tmp_path / name, content)}{column}") == TWO


def test_parquet_skips_nulls(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"n": [1, 2, 3], "t": [TWO[0], None, TWO[1]]})
    assert read_texts(f"{path}#t") == TWO


def test_quotes_in_a_tsv_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'say "hi\t1\n"open\t2\n')
    assert read_texts(f"{path}#0") == ['say "hi', '"open']


def test_a_quoted_csv_field_may_span_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 't,n\n"two\nlines",1\n')
    assert read_texts(f"{path}#t") == ["two\nlines"]


def test_a_long_csv_field_is_read_and_the_limit_of_csv_is_put_back(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "t\n" + "x" * (limit + 1))
    assert len(read_texts(f"{path}#t")[0]) == limit + 1
    assert csv.field_size_limit() == limit


def test_only_line_ends_part_the_texts_of_a_txt_file(tmp_path: Path) -> None:
    text = "one\u2028text\x0cstill\x85one"
    assert read_texts(str(write(tmp_path / "a.txt", text))) == [text]


def test_texts_with_a_separator_inside_survive_jsonl(tmp_path: Path) -> None:
    text = "one\u2028text\nof two lines"
    path = write(tmp_path / "a.jsonl", json.dumps({"t": text}, ensure_ascii=False))
    assert read_texts(f"{path}#t") == [text]


def test_read_all_concatenates_and_keeps_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.txt", "c\na"), write(tmp_path / "2.txt", "b\na")
    assert read_all([str(one), str(two)]) == ["c", "a", "b", "a"]


@pytest.mark.subprocess
def test_reading_a_text_file_imports_nothing_heavy(tmp_path: Path) -> None:
    import subprocess

    path = write(tmp_path / "a.txt", "text")
    heavy = "{'torch', 'transformers', 'ray', 'pyarrow', 'datasets'}"
    code = f"import sys; from ffsplit.calibration.sources import read_texts; read_texts({str(path)!r}); "
    code += f"sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- files: errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", "", "", "{path}: the file is empty; name a file with text in it"),
        ("a.txt", " \n\n", "", "{path}: the file is empty; name a file with text in it"),
        ("a.txt", "x", "#t", "{path}#t: a .txt file has no columns; write {path}"),
        ("a.txt", b"ok\nb\xffd", "", "{path}:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a.csv", b"t\nok\n\xe9\n", "#t", "{path}:3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a.csv", "", "#t", "{path}#t: the file is empty; name a file with text in it"),
        (
            "a.csv",
            "a,b\n",
            "",
            "{path}: no column is named, write SOURCE#column; the columns there are 'a', 'b'",
        ),
        (
            "a.csv",
            "a,b\n",
            "#",
            "{path}#: no column is named, write SOURCE#column; the columns there are 'a', 'b'",
        ),
        ("a.csv", "a,b\n1,2", "#t", "{path}#t: there is no column 't'; the columns there are 'a', 'b'"),
        ("a.tsv", "a\tb\n1\t2", "#t", "{path}#t: there is no column 't'; the columns there are 'a', 'b'"),
        ("a.csv", "a,b\n1,2", "#2", "{path}#2: no column 2: its 2 column(s) are numbered 0 to 1"),
        (
            "a.csv",
            "a,b\n1\n",
            "#b",
            "{path}:2: the row has 1 column(s), not 2; mend its delimiters or quotes",
        ),
        (
            "a.csv",
            'a\n"x" y\n',
            "#a",
            "{path}:2: ',' expected after '\"'; mend its quotes, or save it as .tsv",
        ),
        (
            "a.csv",
            'a\nb\n"x\n',
            "#a",
            "{path}:3: unexpected end of data; mend its quotes, or save it as .tsv",
        ),
        (
            "a.csv",
            "a,b\n1,\n",
            "#b",
            "{path}#b: no text left, everything there is empty; name another file or column",
        ),
        ("a.jsonl", '{"t": 1}', "#t", "{path}:1: field 't' is int, not a string; name a field of text"),
        ("a.jsonl", '{"t": null}', "#t", "{path}:1: field 't' is null, not a string; name a field of text"),
        (
            "a.jsonl",
            '{"t": "a"}\n\n{"t": "\\ud800"}',
            "#t",
            "{path}:3: field 't' holds half a surrogate pair; mend its \\u escapes",
        ),
        (
            "a.jsonl",
            '{"t": "a"}\n{"t": "b"',
            "#t",
            "{path}:2: invalid JSON (Expecting ',' delimiter); write one object a line",
        ),
        ("a.jsonl", "[" * 100_000, "#t", "{path}:1: invalid JSON (unreadable); write one object a line"),
        ("a.jsonl", '"a"', "#t", "{path}:1: not a JSON object; write one object a line"),
        (
            "a.jsonl",
            '{"t": "a"}\n{"u": "b", "n": 1}',
            "#t",
            "{path}:2: there is no field 't'; the fields there are 'u', 'n'",
        ),
        (
            "a.jsonl",
            '{"t": "a"}',
            "",
            "{path}:1: no field is named, write SOURCE#field; the fields there are 't'",
        ),
        ("a.json", "{}", "#t", "{path}#t: unknown suffix '.json#t'; the known forms are {forms}"),
        ("a.text", "x", "", "{path}: unknown suffix '.text'; the known forms are {forms}"),
        ("text", "x", "", "{path}: unknown form; the known forms are {forms}"),
    ],
)
def test_errors_in_files(tmp_path: Path, name: str, content: str | bytes, column: str, message: str) -> None:
    path = write(tmp_path / name, content)
    assert error_of(f"{path}{column}") == message.replace("{path}", str(path)).replace("{forms}", FORMS)


def test_a_missing_file(tmp_path: Path) -> None:
    spec = f"{tmp_path}/none.csv#t"
    assert error_of(spec) == f"{spec}: the file does not exist; check the path"


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    for spec in (f"{tmp_path}", f"{tmp_path}/d.csv#t"):
        assert error_of(spec) == f"{spec}: it is a directory; name a file in it"


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "x")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error_of(path) == f"{path}: Permission denied; check the file"


def test_a_long_header_is_listed_in_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",".join(["x" * 50] * 30) + "\n")
    assert error_of(f"{path}#t").endswith(", ".join([repr("x" * 40)] * 20) + ", ...")


def test_parquet_errors(tmp_path: Path) -> None:
    spec = write_parquet(tmp_path / "a.parquet", {"n": [1], "t": [None], "s": ["a"]})
    assert error_of(f"{spec}#x") == f"{spec}#x: there is no column 'x'; the columns there are 'n', 't', 's'"
    assert error_of(spec).startswith(f"{spec}: no column is named, write SOURCE#column; ")
    assert error_of(f"{spec}#n") == f"{spec}#n: column 'n' holds int, not text; name another"
    assert error_of(f"{spec}#t").startswith(f"{spec}#t: no text left, everything there is empty; ")
    broken = write(tmp_path / "b.parquet", "not parquet at all")
    assert error_of(f"{broken}#t").startswith(
        f"{broken}#t: not a Parquet file that can be read (Parquet magic"
    )
    with_directory_of_its_name = tmp_path / "d.parquet"
    with_directory_of_its_name.mkdir()
    assert error_of(f"{with_directory_of_its_name}#t").endswith("it is a directory; name a file in it")
    empty = write(tmp_path / "c.parquet", "")
    assert error_of(f"{empty}#t").startswith(f"{empty}#t: not a Parquet file that can be read (")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    """As joins leave them; which is meant is not for us to say. Others are read as ever."""
    parquet = tmp_path / "a.parquet"
    columns = [pyarrow.array(["a", "b"]), pyarrow.array(["c", "d"]), pyarrow.array(["e", "f"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["id", "id", "text"]), parquet)
    table = write(tmp_path / "a.csv", "id,id,text\na,c,e\nb,d,f\n")
    for path in (str(parquet), table):
        assert error_of(f"{path}#id") == f"{path}#id: 2 columns are named 'id'; rename all but one"
        assert read_texts(f"{path}#text") == ["e", "f"]
    assert read_texts(f"{table}#1") == ["id", "c", "d"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
@pytest.mark.parametrize("suffix", ["txt", "parquet", "csv", "jsonl"])
def test_a_name_that_no_disk_takes(tmp_path: Path, name: str, suffix: str) -> None:
    assert "\n" not in error_of(f"{tmp_path / name}.{suffix}#t")


def test_a_table_that_pyarrow_reads_and_python_does_not(tmp_path: Path) -> None:
    """A moment outside the calendar that Python has: pyarrow raises as it makes values of it."""
    path = tmp_path / "a.parquet"
    moments = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"t": moments}), path)
    assert "\n" not in error_of(f"{path}#t")


# ---- schemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["foo:bar", "ftp://x", "https://x/a.txt"])
def test_an_unknown_scheme(spec: str) -> None:
    scheme = spec.split(":")[0]
    assert error_of(spec) == f"{spec}: unknown scheme '{scheme}:'; the known forms are {FORMS}"


def test_an_empty_spec() -> None:
    assert error_of("") == f"an empty source: unknown form; the known forms are {FORMS}"


def test_an_unknown_builtin() -> None:
    known = "there are builtin:text and builtin:pydoc"
    assert error_of("builtin:x") == f"builtin:x: unknown builtin 'x'; {known}"


class FakeDataset(dict[str, list[object]]):
    """What load_dataset gives, as far as it is used here."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stands in for `datasets`; the calls it got."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> FakeDataset:
        calls.append((name, config, split))
        if name == "offline":
            raise ConnectionError("\nCouldn't reach the hub\nmore lines")
        return FakeDataset(text=["a", None, " b "], label=[0, 1, 2])

    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_dataset(hub: list[tuple[object, ...]]) -> None:
    assert read_texts("hf:org/name#text@train[:10%]") == ["a", "b"]
    assert read_texts("hf:glue:sst2#text@validation") == ["a", "b"]
    assert hub == [("org/name", None, "train[:10%]"), ("glue", "sst2", "validation")]


@pytest.mark.parametrize("spec", ["hf:", "hf:imdb", "hf:imdb#text", "hf:imdb@train", "hf:#text@train"])
def test_a_hub_spec_that_lacks_a_part(spec: str) -> None:
    expected = "write hf:dataset[:config]#column@split, for example hf:imdb#text@train"
    assert error_of(spec) == f"{spec}: {expected}"


def test_hub_errors(hub: list[tuple[object, ...]]) -> None:
    assert error_of("hf:offline#text@train") == (
        "hf:offline#text@train: ConnectionError: Couldn't reach the hub; "
        "check the name, the network and HF_TOKEN, or name a file"
    )
    spec = "hf:imdb#x@train"
    assert error_of(spec) == f"{spec}: there is no column 'x'; the columns there are 'text', 'label'"
    spec = "hf:imdb#label@train"
    assert error_of(spec) == f"{spec}: column 'label' holds int, not text; name another"
