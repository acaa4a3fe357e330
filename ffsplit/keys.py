"""Deterministic keys: hashes that name results by everything that can change them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ALGORITHM_VERSION = 3
"""Part of every key, so that results of another algorithm are never taken for this one's.

Raise it with any change that gives the same configuration other bytes of statistics or weights: another
order of summation, sampling, default of a recipe's step, or rule for layouts. Speed, messages, measurements
and stored formats do not count. What is published under the old number stays as it is.
"""


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces), as 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """The name of a stage's results: 16 hex digits of the hash of everything that can change them."""
    return digest_of({"stage": stage, "algorithm": ALGORITHM_VERSION, "inputs": dict(inputs)})[:16]
