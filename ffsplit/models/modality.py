"""What the towers of a model read: text, pictures or sound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ffsplit.models.family import Medium
from ffsplit.models.inputs import MEDIUM_OF
from ffsplit.models.names import main_inputs
from ffsplit.models.structure import Modules

_SOUND_OR_PICTURE: tuple[tuple[str, Medium], ...] = (
    (r"vision|visual|image|picture|video|vit|pixel|projector|q_?former|resampler|perceiver", "image"),
    (r"audio|speech|sound|acoustic", "sound"),
)


def parents_of(block: str, modules: Modules) -> Iterator[tuple[str, Any]]:
    """The modules around a block, from the inside, that are models with a config of their own."""
    parts = block.split(".")
    for length in reversed(range(len(parts))):
        path = ".".join(parts[:length])
        if hasattr(modules[path], "config") and hasattr(modules[path], "main_input_name"):
            yield path, modules[path]


def reads_of(modules: Modules, block: str) -> Medium:
    """What the tokens of a tower are made from: by the innermost model around it that says so."""
    for path, owner in parents_of(block, modules):
        if named := modality_named(path):
            return named
        main, *_ = main_inputs(owner)
        if main in MEDIUM_OF:  # not states or latents, which the model around it makes
            return MEDIUM_OF[main]
    return "text"


def modality_named(path: str) -> Medium | None:
    """What a module reads that is named after it, other than text: vision_tower, or vision_moe in a block."""
    return next((reads for pattern, reads in _SOUND_OR_PICTURE if re.search(pattern, path.lower())), None)
