"""The names that keys, files, runs and attempts may have."""

from __future__ import annotations

import re
import unicodedata

RUN_KEY = re.compile(r"[0-9a-f]{16}")
ATTEMPT_ID = re.compile(r"[0-9a-f]{12}")

_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters, lone surrogates and line separators: they break a terminal, JSON or S3."""


def is_safe_path(path: str) -> bool:
    """Whether a path stays inside the directory it is relative to, on any system and in any store.

    Safe is: forward slashes only, no leading or trailing one, no empty, `.` or `..` component, no
    backslash, no control character.
    """
    if "\\" in path or any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in path):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))
