"""Which field of a config states the width of which FFNs: found by changing it and building the model again.

A field is taken if it states the widths of FFNs exactly, and nothing else of the model changes with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ffsplit.models.family import Architecture, FFNPaths, Tower
from ffsplit.models.names import base_of
from ffsplit.models.structure import Modules, find_in_modules

_WIDTH_WORDS = re.compile(r"intermediate|ffn|inner|mlp|feed_?forward|d_ff|hidden_dim|expert")


def with_width_fields(
    row: Architecture, model: Any, config: Any, build: Callable[[Any], Any]
) -> Architecture:
    """The row with the fields that state a width, and nothing but widths of one kind of FFN."""
    before = _shapes_and_widths(model)
    fields: dict[tuple[str, str | None], str] = {}
    for part in dict.fromkeys(tower.config for tower in row.towers):
        for field in _candidates(config, part, widths=set(before.widths.values())):
            changed = type(config).from_dict(config.to_dict())
            owner = config_at(changed, part)
            value = 2 * (getattr(owner, field) or max(before.widths.values()))
            try:
                setattr(owner, field, value)
                after = _shapes_and_widths(build(changed))
            except Exception:  # the value does not fit the others
                continue
            moved = {name for name, width in before.widths.items() if after.widths.get(name) != width}
            others = {
                name
                for name in before.shapes.keys() | after.shapes.keys()
                if before.shapes.get(name) != after.shapes.get(name)
            }
            if not others and all(after.widths.get(name) == value for name in moved):
                fields |= {(name, part): field for name in moved}
    towers = []
    for tower in row.towers:
        ffns = []
        for paths in tower.ffns:
            down = re.compile(_as_regex(tower, paths))
            named = [name for name in before.widths if down.fullmatch(name)]
            stated = {fields.get((name, tower.config)) for name in named}
            width_field = stated.pop() if len(stated) == 1 else None
            ffns.append(paths.model_copy(update={"width_field": width_field}))
        towers.append(tower.model_copy(update={"ffns": tuple(ffns)}))
    return row.model_copy(update={"towers": tuple(towers)})


class _Sizes(NamedTuple):
    shapes: dict[str, torch.Size]
    """Of every parameter outside the FFNs."""
    widths: dict[str, int]
    """Of every FFN, by the path of its down projection, or of its experts."""


def _shapes_and_widths(model: Any) -> _Sizes:
    base = base_of(model)
    found = find_in_modules(Modules.of(base))
    inside = tuple(
        f"{path}."
        for each in found
        for path in ((each.scope,) if each.experts else (each.up, each.gate, each.down))
        if path is not None
    )
    shapes = {name: value.shape for name, value in base.named_parameters() if not name.startswith(inside)}
    return _Sizes(shapes, {each.scope if each.experts else each.down: each.width for each in found})


def _candidates(config: Any, part: str | None, *, widths: set[int]) -> list[str]:
    """Fields of a part of a config that may state a width: those of its value, or without one."""
    fields = vars(config_at(config, part))
    return [
        name
        for name, value in fields.items()
        if _WIDTH_WORDS.search(name)
        and (value is None or (isinstance(value, int) and not isinstance(value, bool) and value in widths))
    ]


def config_at(config: Any, part: str | None) -> Any:
    """A part of a config, given by its dotted path; None: all of it."""
    for name in part.split(".") if part else ():
        config = getattr(config, name)
    return config


def _as_regex(tower: Tower, paths: FFNPaths) -> str:
    path = (paths.module if paths.experts else paths.down) or ""
    return re.escape(f"{tower.blocks}.{path}" if path else tower.blocks).replace(r"\*", r"\d+")
