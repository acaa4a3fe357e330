"""The model card that a source brings: what it tells a hub, and what it says about use and limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CARD_NAME = "README.md"
ORIGINAL_CARD = "README.original.md"
"""The original's model card in an artifact, whose README.md is its own card."""

_FRONT = re.compile(r"---\n(.*?\n)---\s*$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r"^# +(.*?)[ #]*$", re.MULTILINE)
_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)[\s#]*")
_TELLS_USE = re.compile(
    r"\b(uses?|misuse|out-of-scope|limits?|limitations?|bias(es)?|risks?|ethic\w*)\b", re.IGNORECASE
)
_TELLS_HOW = re.compile(r"\b(how to|use with|get(ting)? started|examples?)\b", re.IGNORECASE)
_NOTHING = re.compile(r"<!--[^\0]*?-->|\[?More Information Needed\]?|^#+ .*$|[\s*_-]", re.MULTILINE)


class SourceCard(NamedTuple):
    """The front matter, all scalars as text, and the sections about use and limits, at heading level 3."""

    fields: dict[str, Any]
    sections: tuple[str, ...] = ()

    def strings(self, name: str) -> tuple[str, ...]:
        """The values of a field that holds one text or several. Other values are for other readers."""
        value = self.fields.get(name)
        values = value if isinstance(value, list) else [value]
        return tuple(each for each in values if isinstance(each, str) and each.strip())


def read_card(directory: Path) -> SourceCard:
    """The original's card in a model's folder; an empty one if there is none."""
    for name in (ORIGINAL_CARD, CARD_NAME):
        if (directory / name).is_file():
            return parse_card((directory / name).read_text("utf-8", "replace"))
    return SourceCard({})


def titled(directory: Path) -> str | None:
    """The model's name, if it is the title of the card in its folder: one word, or a hub id."""
    card = directory / CARD_NAME
    if not card.is_file():
        return None
    found = _TITLE.search(card.read_text("utf-8", "replace"))
    return found[1] if found is not None and _NAME.fullmatch(found[1]) else None


def parse_card(text: str) -> SourceCard:
    """A card's front matter and sections. Invalid YAML counts as none: people write cards for people."""
    front = _FRONT.match(text)
    try:
        fields = yaml.load(front[1], yaml.BaseLoader) if front else None  # `no` is Norwegian, not false
    except Exception:
        fields = None
    body = text[front.end() :] if front else text
    return SourceCard(fields if isinstance(fields, dict) else {}, tuple(_sections(body)))


def _sections(body: str) -> Iterator[str]:
    """The sections about use and limits, each with what is below its heading. Empty ones are left out."""
    lines, depth = list[str](), 0
    for line, level in [*_levels(body), ("", 1)]:
        if level and depth and level <= depth:
            section = "\n".join(lines).strip()
            if _NOTHING.sub("", section):
                yield section
            lines, depth = [], 0
        heading = _HEADING.fullmatch(line)
        if level and not depth and heading and _TELLS_USE.search(heading[2]):
            depth = 0 if _TELLS_HOW.search(heading[2]) else level
        if depth:
            lines.append("#" * min(6, level - depth + 3) + line.lstrip("#") if level else line)


def _levels(body: str) -> Iterator[tuple[str, int]]:
    """Every line, and the level of its heading: 0 for other lines, and for comments in blocks of code."""
    fence = ""
    for line in body.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip().startswith(fence):
            fence = ""
        heading = None if fence or mark else _HEADING.fullmatch(line)
        yield line, len(heading[1]) if heading else 0
