"""The paths in a family's row as patterns of tensor names: a `*` stands for a number."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ffsplit.models.family import Architecture, Tower
from ffsplit.models.names import TensorNames


def join_paths(block: str, path: str) -> str:
    """Join two module paths; either may be empty."""
    return f"{block}.{path}" if block and path else block or path


def base_prefixes(architecture: Architecture, names: TensorNames) -> list[str]:
    """The prefixes of FFN module names, sorted. The FFNs of one model share one prefix."""
    patterns = dict.fromkeys(each for tower in architecture.towers for each in down_patterns(tower))
    regexes = [re.compile(rf"((?:.*\.)?){as_regex(pattern)}") for pattern in patterns]
    matches = (regex.fullmatch(name) for name in names.modules for regex in regexes)
    found = {match[1] for match in matches if match}
    if architecture.base is None:
        return sorted(found)
    return sorted(found & {"", f"{architecture.base}." if architecture.base else ""})


def towers_in(architecture: Architecture, names: TensorNames) -> list[str]:
    """The paths of a family's towers that have an FFN among these tensors."""
    found = []
    for tower in architecture.towers:
        regexes = [re.compile(rf"(?:.*\.)?{as_regex(pattern)}") for pattern in down_patterns(tower)]
        if any(regex.fullmatch(name) for name in names.modules for regex in regexes):
            found.append(tower.path)
    return found


def down_patterns(tower: Tower) -> list[str]:
    """Name patterns of a tower's down projections, relative to the base model."""
    found = []
    for paths in tower.ffns:
        found.append(f"{join_paths(tower.blocks, paths.down)}.weight")
        if paths.stack is not None:
            found.append(join_paths(tower.blocks, f"{paths.module}.{paths.stack.down}"))
    return found


def as_regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"\d+")


def numbered(pattern: str, numbers: Sequence[int]) -> str:
    """A pattern with numbers for its first `*`."""
    for number in numbers:
        pattern = pattern.replace("*", str(number), 1)
    return pattern


def numbers_in(block: str, pattern: str) -> list[int]:
    """The numbers of a block's path for the `*` in its pattern."""
    pairs = zip(block.split("."), pattern.split("."), strict=True)
    return [int(part) for part, wanted in pairs if wanted == "*"]
