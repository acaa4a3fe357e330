"""The records that make an attempt the result of its run: commits, which are the truth, and their reading."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Literal

from pydantic import Field, field_validator

from ffsplit.artifacts.paths import ATTEMPT_ID, RUN_KEY
from ffsplit.artifacts.schema import NewerSchema, Versioned, read_record
from ffsplit.artifacts.stores import MissingKey, Store, read_at_most
from ffsplit.config import Record
from ffsplit.errors import ArtifactError

COMMIT_NAME = "commit.json"
MAX_RECORD_BYTES = 1 << 20
NUM_READERS = 16

Kind = Literal["model", "statistics"]


class Named(Versioned):
    """One committed attempt and when it was committed."""

    run_key: str = Field(pattern=f"^{RUN_KEY.pattern}$")
    attempt: str = Field(pattern=f"^{ATTEMPT_ID.pattern}$")
    committed_at: str = Field(description="UTC, ISO 8601")

    @field_validator("committed_at")
    @classmethod
    def _is_utc(cls, text: str) -> str:
        if datetime.fromisoformat(text).utcoffset() != timedelta(0):
            raise ValueError("is not in UTC")
        return text

    @property
    def order(self) -> tuple[datetime, str]:
        """Later commits compare greater; the run key decides a tie."""
        return datetime.fromisoformat(self.committed_at), self.run_key


class Commit(Named):
    """What makes one attempt the result of its run."""

    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    kind: Kind


def read_commit(store: Store, run_key: str) -> Commit | None:
    """The commit of a run, None when it has none. Raises ArtifactError when it cannot be understood."""
    key = f"{run_key}/{COMMIT_NAME}"
    try:
        data = read_at_most(store, key, MAX_RECORD_BYTES)
        commit = read_record(Commit, data, name=f"{store.uri}/{key}")
    except MissingKey:
        return None
    except NewerSchema:
        raise
    except ArtifactError as error:
        raise ArtifactError(f"{error}: delete the file and publish again") from None
    if commit.run_key != run_key:
        raise ArtifactError(f"{store.uri}/{key} is the commit of another run, {commit.run_key}")
    return commit


def run_keys(store: Store) -> list[str]:
    """The runs of a store, committed or not, sorted. Costs one listing."""
    return [name for name in store.list_directories("") if RUN_KEY.fullmatch(name)]


def read_commits(store: Store, keys: Iterable[str]) -> list[Commit]:
    """The commits of some runs, oldest first, without those that have none. Costs one read a run."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = list(pool.map(lambda key: read_commit(store, key), keys))
    return sorted((commit for commit in found if commit), key=lambda commit: commit.order)


def list_commits(store: Store) -> list[Commit]:
    """Every committed run of a store, oldest first, read from the commits themselves."""
    return read_commits(store, run_keys(store))


def record_bytes(record: Record) -> bytes:
    """A record as it is stored."""
    return (record.model_dump_json(indent=2) + "\n").encode()
