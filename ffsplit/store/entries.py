"""Files in stores and manifests: the names they may have, and the records that list them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ffsplit.config import Record
from ffsplit.errors import ConfigError

RUN_KEY = re.compile(r"[0-9a-f]{16}")
ATTEMPT_ID = re.compile(r"[0-9a-f]{12}")
MAX_NAME_BYTES = 255

_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control characters, invisible ones, lone surrogates, line separators: they deceive or break something."""


def is_safe_path(path: str) -> bool:
    """Whether a path stays inside the directory it is relative to, on any system and in any store.

    Safe is: forward slashes only, no leading or trailing one, no empty, `.` or `..` component, no
    backslash, no control or invisible character, and no component over 255 bytes.
    """
    if "\\" in path or any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in path):
        return False
    return all(
        part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in path.split("/")
    )


def colliding(paths: Iterable[str]) -> str | None:
    """A path that some file system takes for another one: the same but for case or Unicode form."""
    seen: set[str] = set()
    for path in paths:
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            return path
        seen.add(folded)
    return None


def check_outside_attempts(path: str, *, flag: str) -> None:
    """Raise ConfigError when a path or URI lies in a published attempt, into which nothing is written."""
    if re.search(rf"(^|/){RUN_KEY.pattern}/{ATTEMPT_ID.pattern}(/|$)", path):
        raise ConfigError(f"{flag} {path} lies in a published attempt: choose another place")


def check_absolute(target: str) -> None:
    """Raise ConfigError for an output that would go with a job's working directory, which is a copy."""
    if "://" not in target and not target.startswith(("/", "~")):
        raise ConfigError(f"{target} must be absolute in a job, whose working directory is a copy")


# Records that stores and manifests share: files with digests or left out, and what a store guarantees.


class FileEntry(Record):
    """One file of the artifact. `path` is relative to the attempt's directory, with forward slashes."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not is_safe_path(path):
            message = "{path} is not a plain relative path inside the artifact"
            raise PydanticCustomError("unsafe_path", message, {"path": repr(path)})
        return path


class LeftOut(Record):
    """What a model's folder holds and its artifact does not."""

    path: str = Field(description="relative to the folder; ends with / for all that is below it")
    reason: str


class StoreGuarantees(Record):
    """What the store promised when the run began, found out by trying it."""

    conditional_put: Literal["atomic", "not atomic"] = Field(
        description="whether of several writers that create one key at once exactly one was told yes"
    )
    checksums: tuple[str, ...] = Field(
        description="the kinds of checksum that an upload may carry and that a wrong value of was refused"
    )
