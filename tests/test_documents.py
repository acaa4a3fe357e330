"""The README and the documents say what is so: figures, error messages, versions, length."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import ffsplit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")


def test_the_readme_is_short_and_names_its_two_commands() -> None:
    assert len(README.splitlines()) <= 150
    assert re.findall(r"^make (\S+)", README, re.MULTILINE) == ["demo", "test"]


def test_the_totals_of_model_types_are_those_of_the_page() -> None:
    page = (ROOT / "docs/models.md").read_text("utf-8")
    totals = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|$", page, re.MULTILINE))
    right, part = totals["right"], totals["right, for the FFNs that the run compresses"]
    (built,) = re.findall(r"(\d+) were built and have FFNs", page)
    assert f"Of the {built} model types that have FFNs, {right} come out right" in README
    assert f"models, {part} more for the part that their calibration rows reach" in README
    assert "silently wrong" not in totals and "fails with a traceback" not in totals


MEASURED = [line for line in README.splitlines() if line.startswith("|") and "](benchmarks/" in line]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.split(":")[0].strip("| "))
def test_every_figure_of_the_readme_is_on_the_page_it_names(row: str) -> None:
    (page,) = re.findall(r"\]\((benchmarks/[^)#]+)", row)
    text = (ROOT / page).read_text("utf-8")
    figures = re.findall(r"(?<![\w/.])(\d+\.\d\d)x?(?![\w.])", row)
    assert figures
    missing = [figure for figure in figures if figure not in text]
    assert not missing


def _strings() -> str:
    """Whatever the package may print: its string literals, one per line, with a blank for each value."""
    found = []
    for path in sorted((ROOT / "ffsplit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        str(getattr(part, "value", " ")) if isinstance(part, ast.Constant) else " "
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_in_troubleshooting_can_be_printed() -> None:
    printed = _strings()
    rows = [line.split(" | ")[0] for line in TROUBLESHOOTING.splitlines() if line.startswith("| `")]
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 100
    unknown = [part for part in quoted if part not in printed]
    assert unknown == []


def test_one_source_of_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "ffsplit.__version__" }' in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == ffsplit.__version__
