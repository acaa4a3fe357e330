"""Text for runs that are given none: what every Python and this package have on board.

`builtin:pydoc` is the prose of Python's documentation. `builtin:text` is that, the prose of the standard
library's docstrings, and everyday sentences, so that words of more than one domain occur. Nothing is
downloaded, so the same Python gives the same text everywhere.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

NUM_EVERYDAY = 10_000
"""Everyday sentences: about as many tokens as the other two parts have together."""

_NOT_PROSE = re.compile(r"::=|>>>|\{\w*\}|  #|^\s*([+|#]|[*=\-~^]{3,}\s*$|(def|class|import) )", re.M)
_NEXT_ITEM = re.compile(r"\n(?=\s*(?:[*-]|\d+\.)\s)")
_PREFIX = re.compile(r"^([*-]|\d+\.|\[\d+\]|\w+ (in|since) version [\d.]+\w*[:,])\s+")
_MARKUP = re.compile(r"\s\[\d+\]|(?<!\w)\*+(?=\w)|(?<=\w)\*+(?!\w)|[\"`]")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z])")
_WORD = re.compile(r"[(“]?[A-Za-z]+(?:['\u2019-][A-Za-z]+)*[)”]?[.,;:!?]?")


def pydoc() -> list[str]:
    """The English sentences of Python's documentation, in the order of its topics.

    Raises ImportError if this Python came without them.
    """
    from pydoc_data.topics import topics

    sentences = (sentence for _, topic in sorted(topics.items()) for sentence in _prose(topic))
    return list(dict.fromkeys(sentences))  # topics quote one another


def general() -> list[str]:
    """Documentation, docstrings and everyday sentences. Parts that this Python came without are missing."""
    try:
        documentation = pydoc()
    except ImportError:
        documentation = []
    return list(dict.fromkeys([*documentation, *docstrings(), *everyday(NUM_EVERYDAY)]))


BUILTINS: Mapping[str, Callable[[], list[str]]] = {"text": general, "pydoc": pydoc}
"""What `builtin:` names."""


# ---- documentation -------------------------------------------------------------------------------


def _prose(topic: str) -> Iterator[str]:
    """The English sentences of one topic: no titles, code, tables, grammar or markup."""
    for block in re.split(r"\n\s*\n", topic):
        if _NOT_PROSE.search(block):
            continue
        for item in _NEXT_ITEM.split(block):
            joined = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", item.strip())
            paragraph = " ".join(_MARKUP.sub("", _PREFIX.sub("", joined)).split())
            yield from filter(_is_prose, _SENTENCE_END.split(paragraph))


def _is_prose(sentence: str) -> bool:
    """Six words at least, three in four of them plain English, and a full stop or colon at the end."""
    words = sentence.split()
    num_plain = sum(_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= 6 and num_plain >= 0.75 * len(words) and bool(re.search(r"[.!?:][)”]?$", sentence))


# fmt: off
DOCUMENTED = (
    "argparse", "collections", "configparser", "difflib", "email", "http", "inspect", "ipaddress",
    "logging", "mailbox", "random", "shutil", "smtplib", "statistics", "subprocess", "tarfile",
    "textwrap", "threading", "tkinter", "turtle", "typing", "unittest", "urllib", "xml", "zipfile",
)
# fmt: on
"""Modules and packages of the standard library with many docstrings."""


@cache
def docstrings() -> tuple[str, ...]:
    """The English sentences of the standard library's docstrings, in the order of `DOCUMENTED`."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for name in DOCUMENTED:
        paths = [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
        for path in paths:
            if path.is_file() and "test" not in path.parts:
                found.update(dict.fromkeys(_docstrings_of(path.read_text("utf-8", "replace"))))
    return tuple(found)


def _docstrings_of(source: str) -> Iterator[str]:
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented):
            yield from _prose(ast.get_docstring(node) or "")


# ---- everyday sentences --------------------------------------------------------------------------

EVERYDAY = "everyday.txt"
_SECTION = re.compile(r"\[(\w+)\]")
_SLOT = re.compile(r"\{(\w+)(?:\.(\d))?\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def everyday(count: int) -> list[str]:
    """`count` sentences from the patterns and word lists of everyday.txt, always the same."""
    text = resources.files("ffsplit.calibration").joinpath(EVERYDAY).read_text("utf-8")
    lists = _sections(text)
    patterns = lists.pop("sentences")
    words = {
        name: [entry.split("/") for line in lines for entry in line.split()] for name, lines in lists.items()
    }
    generator = random.Random(0)

    def word(slot: re.Match[str]) -> str:
        forms = generator.choice(words[slot[1]])
        return forms[min(int(slot[2] or 1), len(forms)) - 1].replace("_", " ")

    return [_written(_SLOT.sub(word, patterns[index % len(patterns)])) for index in range(count)]


def _sections(text: str) -> dict[str, list[str]]:
    """The lines of each section, by its name."""
    found: dict[str, list[str]] = {}
    section: list[str] = []
    for line in text.splitlines():
        title = _SECTION.fullmatch(line)
        if title:
            section = found.setdefault(title[1], [])
        elif line and not line.startswith("#"):
            section.append(line)
    return found


def _written(sentence: str) -> str:
    """With `an` before a vowel, and a capital where the sentence has an end."""
    sentence = _ARTICLE.sub(r"\1n ", sentence)
    return sentence[0].upper() + sentence[1:] if sentence[-1] in '.?!"' else sentence
