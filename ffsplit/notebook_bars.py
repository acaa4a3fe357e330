"""Progress bars in a notebook: one output of the cell, which is replaced as they move."""

from __future__ import annotations

import html
from io import StringIO
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

WIDTH = 1000
"""Columns before a line breaks. The browser breaks lines where its own width ends."""
PLACE: dict[str, Any] = {"force_terminal": True, "force_jupyter": False}
PAGE = (
    "<pre style=\"white-space: pre-wrap; line-height: normal; font-family: Menlo, 'DejaVu Sans Mono', "
    "Consolas, 'Courier New', monospace\">{}</pre>"
)


def is_in_notebook() -> bool:
    """Whether this is a kernel, whose output a notebook shows."""
    return Console().is_jupyter


class NotebookBars(Progress):
    """Rich's bars without its terminal. What is printed on their console stands above them.

    Rich itself shows bars in notebooks only if ipywidgets is installed, and they are lost when the notebook
    is closed. A displayed output needs nothing and is saved with the notebook.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        self._above = StringIO()
        self._display: Any = None
        super().__init__(*columns, console=Console(file=self._above, width=WIDTH, **PLACE))

    def start(self) -> None:
        from IPython.display import display

        self._display = display(self, display_id=True)

    def stop(self) -> None:
        self.refresh()
        self._display = None

    def refresh(self) -> None:
        if self._display is not None:
            self._display.update(self)

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, str]:
        canvas = Console(file=StringIO(), width=WIDTH, record=True, color_system="truecolor", **PLACE)
        canvas.print(self, end="")
        bars = canvas.export_html(inline_styles=True, code_format="{code}", clear=False)
        above = self._above.getvalue()
        return {
            "text/plain": above + canvas.export_text(),
            "text/html": PAGE.format(html.escape(above) + bars),
        }
