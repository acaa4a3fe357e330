"""The page in docs is what the table of architectures makes it."""

from __future__ import annotations

from pathlib import Path

from ffsplit.models.table import table


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text("utf-8") == table(), "run make docs"
