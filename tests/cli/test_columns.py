"""Tables at the width of a terminal: nothing is torn, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ffsplit.api import compress
from ffsplit.cli import main
from ffsplit.cli.columns import ELLIPSIS, Table, print_sentence, shortened
from ffsplit.cli.tables import print_benchmark, print_manifest
from ffsplit.store.manifest import Manifest
from tests.cli.test_summary import task
from tests.cli.test_timings import record
from tests.report.conftest import manifest_fields, measurement_fields
from tests.small_jobs import SmallJob

Captured = pytest.CaptureFixture[str]
PATH = "/data/models/sentence-transformers/all-MiniLM-L6-v2"


def table(**options: object) -> Table:
    made = Table("a title", ("name", "a model", "how it was made", "size"), **options)  # type: ignore[arg-type]
    made.add("first", PATH, "with the recipe fast and nothing else", "72.4\u00a0MB")
    made.add("second", "short", "with best", "9.90\u00a0MB")
    return made


def test_without_a_terminal_a_table_has_its_natural_width() -> None:
    lines = list(table().lines(None))
    assert lines[0] == "a title" and len(lines) == 5
    assert PATH in lines[3] and "with the recipe fast and nothing else" in lines[3]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_table_wraps_between_words_and_loses_none(width: int) -> None:
    lines = list(table(paths=("a model",), left=("how it was made",)).lines(width))
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "72.4\u00a0MB" in text and "9.90\u00a0MB" in text
    words = ["with", "the", "recipe", "fast", "and", "nothing", "else"]
    assert [word for word in words if not re.search(rf"(?<!\S){word}(?!\S)", text)] == []


def test_a_path_loses_its_middle_only_where_there_is_no_room() -> None:
    assert shortened(PATH, len(PATH)) == PATH
    assert shortened(PATH, 20) == f"/data/{ELLIPSIS}-MiniLM-L6-v2"
    assert len(shortened(PATH, 20)) == 20
    wide, narrow = (list(table(paths=("a model",)).lines(width)) for width in (200, 70))
    assert PATH in wide[3] and ELLIPSIS in narrow[3] and "-v2" in "".join(narrow)


def test_what_does_not_fit_side_by_side_is_printed_in_parts() -> None:
    names = ("layer", *(f"budget-number-{index}" for index in range(8)))
    made = Table("", names)
    made.add("layer 0", *(f"width-{index}" for index in range(8)))
    lines = list(made.lines(40))
    assert max(map(len, lines)) <= 40
    assert sum(line.startswith("layer 0") for line in lines) == 8
    assert all(f"width-{index}" in "".join(lines) for index in range(8))


def test_an_empty_column_takes_no_room_on_a_terminal() -> None:
    made = Table("", ("a", "empty", "b"))
    made.add("1", "", "2")
    assert "empty" not in "".join(made.lines(80)) and "empty" in "".join(made.lines(None))


@pytest.mark.parametrize("width", [1, 20, 40])
def test_letters_of_double_width_and_tiny_terminals_end(width: int) -> None:
    made = Table("\u6a21\u578b", ("a", "\u6a21\u578b"))
    made.add("1", "\u4e00\u4e8c\u4e09 " * 12)
    assert "\u4e00\u4e8c\u4e09" in "".join(made.lines(width))


def test_sentences_wrap_and_paths_in_them_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_sentence(f"the run's files: 389\u00a0MB in {PATH}, of which much is free")
    lines = capsys.readouterr().out.splitlines()
    assert f"{PATH}," in lines and lines[0] == "the run's files: 389 MB in"


def test_every_table_of_a_real_run_fits_80_columns(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = str(tmp_path / "out")
    compress(small_job.config(out))
    capsys.readouterr()
    budgets = ["0.1", "0.2", "0.3535", "0.5", "0.65", "80%"]
    for command in (["inspect", str(small_job.model)], ["plan", out, "--keep", *budgets], ["list", out]):
        assert main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        torn = [line for line in lines if len(line) > 80 and " " in line.strip()]
        assert lines and torn == [], command
    print_benchmark(record())
    fields = measurement_fields() | {"tasks": (task("a-long-name-of-a-task.csv", 0),)}
    print_manifest(Manifest.model_validate(manifest_fields(6) | {"measurements": fields}), out="/out")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("from ")] == []


def test_a_wide_terminal_is_used(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Six budgets side by side need more than 80 columns, and take them."""
    out = str(tmp_path / "out")
    compress(small_job.config(out))
    for columns, parts in (("80", 2), ("200", 1)):
        monkeypatch.setenv("COLUMNS", columns)
        capsys.readouterr()
        assert main(["plan", out, "--keep", "0.1", "0.2", "0.3535", "0.5", "0.65", "0.8"]) == 0
        assert len(re.findall("^layer 0 ", capsys.readouterr().out, re.MULTILINE)) == parts
