"""Horizontal bars with their label, value and note written out: a figure that needs no axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ffsplit.report.svg import GRID, INK, MUTED, add_canvas, render_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR_HEIGHT: Final = 13
_BAR_GAP: Final = 4
_ROW_GAP: Final = 15
_LABEL_WIDTH: Final = 132
_NOTE_WIDTH_PER_CHARACTER: Final = 7.2
_VALUE_WIDTH: Final = 74
_NARROWEST_WITH_COLUMNS: Final = 600


@dataclass(frozen=True)
class Bar:
    """One bar: its length, in one unit for the whole figure; what is written at its end; its colour."""

    value: float
    text: str
    color: str


@dataclass(frozen=True)
class BarRow:
    """One or more bars under one label, with a note."""

    label: str
    note: str
    bars: tuple[Bar, ...]


def bar_rows(rows: Sequence[BarRow], *, width: float, name: str, title: str, description: str) -> str:
    """Rows of bars as SVG. A narrow figure has label and note above the bars, a wide one at their sides."""
    assert rows
    wide = width >= _NARROWEST_WITH_COLUMNS
    heading = 0 if wide else 20
    heights = [heading + len(row.bars) * (_BAR_HEIGHT + _BAR_GAP) - _BAR_GAP for row in rows]
    longest = max(bar.value for row in rows for bar in row.bars) or 1
    label_width = max(len(row.label) for row in rows) * _NOTE_WIDTH_PER_CHARACTER + 16
    left = max(_LABEL_WIDTH, label_width) if wide else 0
    note_width = max(len(row.note) for row in rows) * _NOTE_WIDTH_PER_CHARACTER if wide else 0
    full = width - left - _VALUE_WIDTH - note_width

    def draw(figure: Figure) -> None:
        axes = add_canvas(figure)
        top = _ROW_GAP / 2
        for row, height in zip(rows, heights, strict=True):
            _draw_texts(axes, row, width=width, middle=top + (height / 2 if wide else 8))
            for index, bar in enumerate(row.bars):
                y = top + heading + index * (_BAR_HEIGHT + _BAR_GAP)
                _draw_bar(axes, bar, left=left, top=y, length=full * bar.value / longest)
            top += height + _ROW_GAP
            if wide and row is not rows[-1]:
                axes.plot([0, width], [top - _ROW_GAP / 2] * 2, color=GRID, lw=1)

    total = sum(heights) + _ROW_GAP * len(rows)
    return render_svg(draw, width=width, height=total, name=name, title=title, description=description)


def _draw_texts(axes: Axes, row: BarRow, *, width: float, middle: float) -> None:
    axes.text(0, middle, row.label, va="center", color=INK)
    axes.text(width - 2, middle, row.note, va="center", ha="right", color=MUTED)


def _draw_bar(axes: Axes, bar: Bar, *, left: float, top: float, length: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), max(length, 1.5), _BAR_HEIGHT, color=bar.color, lw=0))
    middle = top + _BAR_HEIGHT / 2
    axes.text(left + length + 8, middle, bar.text, va="center", color=INK)
