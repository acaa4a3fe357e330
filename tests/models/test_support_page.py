"""The page in docs is what the table of architectures makes it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from ffsplit.models.support_page import table


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text("utf-8") == table(), "run make docs"


def test_the_command_prints_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ffsplit.models.support_page")
    runpy.run_module("ffsplit.models.support_page", run_name="__main__")
    assert capsys.readouterr().out == table()
