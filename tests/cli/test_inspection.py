"""What `ffsplit inspect` prints of widths, and of the engines that they suit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ffsplit.cli import main
from tests.shaped_checkpoints import save_llama_shape

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
TITLE = "engines that suit the widths"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_llama_shape(tmp_path / "model", hidden_size=64, intermediate_size=1536, **SIZES))


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of the table of engines, by the budget."""
    lines = printed.partition(TITLE)[2].strip().splitlines()[2:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {budget: others for budget, *others in cells}


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_engines_stand_beside_the_widths_in_80_columns(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = inspected(capsys, model)
    assert all(len(line) <= 80 for line in printed.partition(TITLE)[2].splitlines())
    assert rows(printed) == {
        "1": ["1,536", "yes", "1, 2, 4", "yes"],
        "0.75": ["1,152", "yes", "1", "no"],
        "0.5": ["768", "yes", "1, 2", "yes"],
        "0.3535": ["512", "yes", "1, 2, 4", "yes"],
        "0.25": ["384", "yes", "1", "no"],
        "0.125": ["192", "yes", "none", "no"],
    }


def test_a_multiple_is_for_all_budgets_that_it_allows(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(inspected(capsys, model, "--width-multiple", "512"))
    assert {budget: cells[0] for budget, cells in found.items()} == {
        "1": "1,536",
        "0.75": "1,024",
        "0.5": "512",
        "0.3535": "512",
    }
    exact = rows(inspected(capsys, model, "--width-multiple", "1"))
    assert exact["0.3535"] == ["542", "no", "none", "no"]


def test_parts_of_a_split_are_all_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(inspected(capsys, model, "--recipe", "paper"))["0.3535"][0] == "256, 1,280"


@pytest.mark.parametrize(
    ("multiple", "said"),
    [
        ("1537", r"--width-multiple 1537 is more than an FFN has: give at most its 1,536 neurons"),
        ("0", r"--width-multiple should be greater than or equal to 1, not 0"),
        ("-64", r"--width-multiple should be greater than or equal to 1, not -64"),
        (
            "many",
            "--width-multiple should be a valid integer, unable to parse string",
        ),
    ],
)
def test_an_impossible_multiple_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], multiple: str, said: str
) -> None:
    for command in (["inspect", model], ["compress", model, "--out", str(tmp_path / "out"), "--dry-run"]):
        assert main([*command, "--width-multiple", multiple]) == 2
        error = capsys.readouterr().err
        assert re.search(said, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
