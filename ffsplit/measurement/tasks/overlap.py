"""How much of the evaluation text a model has been calibrated on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_BREAK = re.compile(r"[\r\n]+|(?<=[.!?])\s+")
SHORTEST_SENTENCE = 4
"""Words; shorter pieces of running text ("He said no.") recur everywhere and prove nothing."""


def count_overlap(texts: Iterable[str], calibration: Iterable[str], *, running: bool) -> int:
    """How many distinct texts also occur in the calibration rows, as a row or as a sentence of one.

    Running text is compared sentence by sentence. Case and white space do not matter.
    """
    known: set[str] = set()
    for row in calibration:
        known.add(_normal(row))
        known.update(_sentences(row))
    if running:
        wanted = {
            sentence
            for text in texts
            for sentence in _sentences(text)
            if len(sentence.split()) >= SHORTEST_SENTENCE
        }
    else:
        wanted = {_normal(text) for text in texts}
    return len(wanted & known)


def _sentences(text: str) -> Iterator[str]:
    return (_normal(piece) for piece in _BREAK.split(text))


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
