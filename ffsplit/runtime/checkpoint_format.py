"""What `config.json` of a split checkpoint says of its FFNs, and where the checkpoint has guards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pydantic import Field

from ffsplit.config import Record
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.models.ffns import FFNPlace

FORMAT_VERSION = 1
"""`version` in `quantization_config`. docs/formats/checkpoint.md says what may change under one number."""


class FFNRun(Record):
    """FFNs one after the other that are alike: how many, what each was, and how each is stored."""

    count: int = Field(ge=1)
    shape: FFNShape
    layout: LayerLayout


def runs_of(layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape]) -> list[FFNRun]:
    """The FFNs of a model, those that are alike said once: a config is copied and printed at loading."""
    alike = groupby(zip(layouts, shapes, strict=True))
    return [FFNRun(count=len(list(ffns)), shape=shape, layout=layout) for (layout, shape), ffns in alike]


def guarded(places: Sequence[FFNPlace]) -> frozenset[int]:
    """The indices of the FFNs that have a guard: the first of each tower, which may be loaded alone.

    A guard is a tensor under the name of one of the original's weights, with a shape that cannot match. It
    makes a load without ffsplit fail, which would otherwise begin with random weights.
    """
    first = {place.tower.path: place.index for place in reversed(places)}
    return frozenset(first.values())
