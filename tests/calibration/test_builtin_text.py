"""The text of runs that are given none: sentences of more than one domain, the same each time."""

from __future__ import annotations

import re
import sys
from importlib import resources
from types import ModuleType

import pytest

from ffsplit.calibration import builtin_text
from ffsplit.calibration.builtin_text import docstrings, everyday, general
from ffsplit.calibration.sources import read_texts
from ffsplit.errors import ConfigError


def test_pydoc_gives_over_a_thousand_distinct_sentences_each_time_the_same() -> None:
    texts = read_texts("builtin:pydoc")
    assert len(texts) == len(set(texts)) > 1_000
    assert texts == read_texts("builtin:pydoc")
    assert all(len(text.split()) >= 6 and text == " ".join(text.split()) for text in texts)
    assert not any(mark in text for text in texts for mark in ("::=", ">>>", '"', "`", "+--", "****"))


def test_pydoc_keeps_prose_and_drops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = """The "x" statement of this language here.
***************************************

It is a *very* plain statement, e.g. \"assert\", which is left-
hand.  Here is another sentence about nothing [3].  Too short.

   stmt ::= "The x statement is followed by a word."

   >>> print("This is code that reads like an English sentence.")

   # This is a comment that reads like an English sentence.
   x = 1

+--------------------+
| This is a table row with quite a few words in it. |

* The first item of a list of two.
* The second item of the list of two.

Changed in version 3.8: The items of the list were swapped.

   x = a + b * c / d - e.
"""
    module = ModuleType("pydoc_data.topics")
    monkeypatch.setattr(
        module, "topics", {"b": topic, "a": "Topics are read by the order of their names."}, raising=False
    )
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    assert read_texts("builtin:pydoc") == [
        "Topics are read by the order of their names.",
        "It is a very plain statement, e.g. assert, which is left-hand.",
        "Here is another sentence about nothing.",
        "The first item of a list of two.",
        "The second item of the list of two.",
        "The items of the list were swapped.",
    ]


def test_a_python_without_pydoc_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="builtin:pydoc: this Python came without pydoc_data; name a file"):
        read_texts("builtin:pydoc")


def test_the_default_text_has_every_part_and_no_sentence_twice() -> None:
    texts = read_texts("builtin:text")
    assert texts == read_texts("builtin:text") and len(texts) == len(set(texts))
    for part in (read_texts("builtin:pydoc"), docstrings(), everyday(100)):
        assert part and set(part) <= set(texts)


def test_the_default_text_of_a_python_without_pydoc_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert set(docstrings()) < set(general())


def test_docstrings_are_prose_of_all_that_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = docstrings()
    assert len(texts) > 1_000
    monkeypatch.setattr(builtin_text, "DOCUMENTED", ("mailbox", "statistics"))
    few = docstrings.__wrapped__()
    assert set(few) < set(texts) and all(len(text.split()) >= 6 for text in few)


def test_everyday_sentences_are_filled_in_and_a_longer_list_begins_with_the_shorter() -> None:
    texts = everyday(1000)
    assert texts[:100] == everyday(100) and len(set(texts)) > 950
    assert not any(re.search(r"[{}_/]|\b[Aa] [aeiou]", text) for text in texts)


def test_every_list_of_words_is_used_and_every_slot_has_a_list() -> None:
    text = resources.files("ffsplit.calibration").joinpath("everyday.txt").read_text("utf-8")
    lists = set(re.findall(r"^\[(\w+)\]$", text, re.M)) - {"sentences"}
    assert lists == {name for name, _ in re.findall(r"\{(\w+)(\.\d)?\}", text.split("[sentences]")[-1])}


def test_forms_that_an_entry_lacks_are_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"sentences": ["{a} {a.2} {a.3}", "A {b}."], "a": ["x/y"], "b": ["owl/owls"]}
    monkeypatch.setattr(builtin_text, "_sections", lambda text: lists)
    assert everyday(2) == ["x y y", "An owl."]
