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
"""Control and invisible characters, lone surrogates, line separators: they mislead readers or break tools."""


def is_safe_path(path: str) -> bool:
    """Whether a path stays inside the directory it is relative to, on any system and in any store.

    A safe path has forward slashes only, none of them leading or trailing; no empty, `.` or `..`
    component; no backslash; no control or invisible character; and no component over 255 bytes.
    """
    if "\\" in path or any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in path):
        return False
    return all(
        part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in path.split("/")
    )


def colliding(paths: Iterable[str]) -> str | None:
    """A path that differs from another only in case or Unicode form: some file systems confuse the two."""
    seen: set[str] = set()
    for path in paths:
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            return path
        seen.add(folded)
    return None


def check_outside_attempts(path: str, *, flag: str) -> None:
    """Raise ConfigError if a path or URI lies in a published attempt: those are never written to."""
    if re.search(rf"(^|/){RUN_KEY.pattern}/{ATTEMPT_ID.pattern}(/|$)", path):
        raise ConfigError(f"{flag} {path} lies in a published attempt: choose another place")


def check_absolute(target: str) -> None:
    """Raise ConfigError for a relative output: it would be lost with the job's copy of the directory."""
    if "://" not in target and not target.startswith(("/", "~")):
        raise ConfigError(f"{target} must be absolute in a job, whose working directory is a copy")


# Records that stores and manifests share: listed files, omitted files, and what a store guarantees.


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
    """A file of the model's folder that was not copied into the artifact."""

    path: str = Field(description="relative to the folder; ends with / for a whole folder")
    reason: str


class StoreGuarantees(Record):
    """What the store guarantees, as probed when the run began."""

    conditional_put: Literal["atomic", "not atomic"] = Field(
        description="atomic: of several writers that created one key at once, at most one succeeded"
    )
    checksums: tuple[str, ...] = Field(
        description="checksum types the server verifies: it rejected a wrong value"
    )
