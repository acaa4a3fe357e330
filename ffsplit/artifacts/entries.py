"""Records that stores and manifests share: files with digests or left out, and what a store guarantees."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ffsplit.artifacts.paths import is_safe_path
from ffsplit.config import Record


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
