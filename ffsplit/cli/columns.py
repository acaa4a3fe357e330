"""Tables and sentences that fit the terminal.

Cells wrap between words, paths lose their middle, and a table that is still too wide is printed in several
parts, each with the first column. Output that is not a terminal's has its natural width. A non-breaking
space is part of a word.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len

GAP = 2
"""Spaces between two columns."""
SHORTEST_PATH = 16
LONGEST_LABEL = 24
ELLIPSIS = "\u2026"
RULE = "-"


def terminal_width() -> int | None:
    """Columns of the terminal that stdout writes to, or what COLUMNS says; None if there is no limit."""
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return None
    return shutil.get_terminal_size().columns


def print_sentence(text: str) -> None:
    """Print prose, wrapped between words. Paths and URIs stay whole, to be copied."""
    print("\n".join(_wrapped(text.replace("\u00a0", " "), terminal_width())))


def whole(text: str) -> str:
    """A text that does not wrap."""
    return text.replace(" ", "\u00a0")


def shortened(path: str, width: int) -> str:
    """A path or name in at most this many characters: its middle is left out, its end is kept longest."""
    if len(path) <= width:
        return path
    first = (width - 1) // 3
    return path[:first] + ELLIPSIS + path[len(path) - (width - 1 - first) :]


@dataclass
class Table:
    """Rows of text below a title. The first column and those in `left` are aligned left, the others right.

    Columns in `paths` are shortened in the middle if there is no room.
    """

    title: str
    names: Sequence[str]
    left: Sequence[str] = ()
    paths: Sequence[str] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    rules: set[int] = field(default_factory=set)

    def add(self, *cells: str) -> None:
        """One row; cells at its end may be left out."""
        self.rows.append(cells + ("",) * (len(self.names) - len(cells)))

    def add_rule(self) -> None:
        """A line between the rows so far and those that follow."""
        self.rules.add(len(self.rows))

    def print(self) -> None:
        """Print it as wide as the terminal allows."""
        print("\n".join(self.lines(terminal_width())))

    def lines(self, width: int | None) -> Iterator[str]:
        """The table in at most `width` characters, if its words allow."""
        if self.title:
            yield from _wrapped(self.title.replace("\u00a0", " "), width)
        for number, part in enumerate(self._parts(width)):
            if number:
                yield ""
            yield from self._drawn(part, self._widths(part, width))

    def _parts(self, width: int | None) -> Iterator[list[int]]:
        """The columns of each part: the first one, and as many others as fit.

        A terminal has no room for a column that is empty.
        """
        part = [0]
        for column in range(1, len(self.names)):
            if width is not None and not any(row[column] for row in self.rows):
                continue
            wider = [*part, column]
            if width is not None and len(part) > 1 and _total(map(self._least, wider)) > width:
                yield part
                wider = [0, column]
            part = wider
        yield part

    def _cells(self, column: int) -> Iterator[str]:
        yield self.names[column]
        yield from (row[column] for row in self.rows)

    def _natural(self, column: int) -> int:
        return max(cell_len(line) for cell in self._cells(column) for line in cell.split("\n"))

    def _least(self, column: int) -> int:
        """The width of the longest word, or of a shortened path. Short labels of rows do not wrap."""
        if column == 0 and self._natural(0) <= LONGEST_LABEL:
            return self._natural(0)
        longest = max(cell_len(word) for cell in self._cells(column) for word in _words(cell))
        return min(longest, SHORTEST_PATH) if self.names[column] in self.paths else longest

    def _widths(self, part: Sequence[int], width: int | None) -> dict[int, int]:
        """The natural widths, made smaller where it costs least: the widest column that can wrap first."""
        widths = {column: self._natural(column) for column in part}
        least = {column: self._least(column) for column in part}
        while width is not None and _total(widths.values()) > width:
            able = [column for column in part if widths[column] > least[column]]
            if not able:
                break
            widest = max(able, key=lambda column: widths[column])
            folded = (self._folded(cell, widest, widths[widest] - 1) for cell in self._cells(widest))
            needed = max(cell_len(line) for cell in folded for line in cell)
            widths[widest] = min(needed, widths[widest] - 1)  # some letters are wider than one
        return widths

    def _drawn(self, part: Sequence[int], widths: dict[int, int]) -> Iterator[str]:
        heads = [self._folded(self.names[column], column, widths[column]) for column in part]
        rule = (" " * GAP).join(RULE * widths[column] for column in part)
        if any(self.names[column] for column in part):
            yield from self._line(heads, part, widths)
        yield rule
        rows = [[self._folded(row[column], column, widths[column]) for column in part] for row in self.rows]
        is_loose = any(len(cell) > 2 for row in rows for cell in row)
        for number, row in enumerate(rows):
            if number in self.rules:
                yield rule
            elif is_loose and number:
                yield ""
            yield from self._line(row, part, widths)

    def _folded(self, cell: str, column: int, width: int) -> list[str]:
        if self.names[column] in self.paths:
            return [shortened(cell, width)]
        return [line for each in cell.split("\n") for line in _wrapped(each, width)]

    def _line(
        self, cells: Sequence[Sequence[str]], part: Sequence[int], widths: dict[int, int]
    ) -> Iterator[str]:
        """One row, as many lines as its tallest cell has."""
        for number in range(max(map(len, cells))):
            pieces = []
            for cell, column in zip(cells, part, strict=True):
                text = cell[number] if number < len(cell) else ""
                space = " " * (widths[column] - cell_len(text))
                is_left = column == 0 or self.names[column] in self.left or self.names[column] in self.paths
                pieces.append(text + space if is_left else space + text)
            yield (" " * GAP).join(pieces).rstrip(" ")


def _total(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + GAP * (len(each) - 1)


def _words(text: str) -> list[str]:
    return text.replace("\n", " ").split(" ")


def _wrapped(text: str, width: int | None) -> list[str]:
    """Lines of at most `width` characters, unless a word is longer."""
    if width is None or cell_len(text) <= width:
        return [text]
    indent = " " * (len(text) - len(text.lstrip(" ")))
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]
