"""The records of what is published: commits, the source of truth, and copies of them for fast reading."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Literal

from pydantic import Field

from ffsplit import logs
from ffsplit.config import Record
from ffsplit.errors import ArtifactError, FFSplitError
from ffsplit.store.entries import ATTEMPT_ID, LATEST_LINK, MANIFEST_NAME, RUN_KEY
from ffsplit.store.manifest import MAX_MANIFEST_BYTES, Manifest
from ffsplit.store.schema import NewerSchema, UtcTime, Versioned, read_record
from ffsplit.store.store import MissingKey, Store, read_at_most

# The records that make an attempt the result of its run, and how to read them.

COMMIT_NAME = "commit.json"
MAX_RECORD_BYTES = 1 << 20
NUM_READERS = 16

Kind = Literal["model", "statistics"]


class Named(Versioned):
    """One committed attempt and when it was committed."""

    run_key: str = Field(pattern=f"^{RUN_KEY.pattern}$")
    attempt: str = Field(pattern=f"^{ATTEMPT_ID.pattern}$")
    committed_at: UtcTime

    @property
    def order(self) -> tuple[datetime, str]:
        """Later commits compare greater; the run key decides a tie."""
        return datetime.fromisoformat(self.committed_at), self.run_key


class Commit(Named):
    """The record that makes one attempt the result of its run."""

    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    kind: Kind


def read_commit(store: Store, run_key: str) -> Commit | None:
    """The commit of a run, None if it has none. Raises ArtifactError if the commit is invalid."""
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
    """The keys of all runs of a store, committed or not, sorted. Costs one listing."""
    return [name for name in store.list_directories("") if RUN_KEY.fullmatch(name)]


def read_commits(store: Store, keys: Iterable[str]) -> list[Commit]:
    """The commits of the given runs, oldest first; runs without one are skipped. Costs one read per run."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = list(pool.map(lambda key: read_commit(store, key), keys))
    return sorted((commit for commit in found if commit), key=lambda commit: commit.order)


def list_commits(store: Store) -> list[Commit]:
    """Every committed run of a store, oldest first, read from the commits themselves."""
    return read_commits(store, run_keys(store))


def record_bytes(record: Record) -> bytes:
    """A record as it is stored."""
    return (record.model_dump_json(indent=2) + "\n").encode()


INDEX_NAME = "index.json"
LATEST_NAME = "latest.json"
MAX_INDEX_BYTES = 256 << 20


class Latest(Named):
    """The hint at the root of a store. `generation` counts its updates."""

    generation: int = Field(default=0, ge=0)


class RunSummary(Record):
    """One committed run as `ffsplit list` shows it. A field is None if the manifest lacks it."""

    commit: Commit
    model: str
    recipe: str
    keep: float | None
    size_bytes: int = Field(description="of every file of the artifact")
    scores: dict[str, float]
    gates: dict[str, bool]


class Index(Versioned):
    """Every commit that the index's writer knew of, oldest first."""

    runs: tuple[RunSummary, ...] = ()


_NEWER = Index()
"""Stands for an index of a newer schema."""


def summarize(commit: Commit, manifest: Manifest) -> RunSummary:
    """The summary of a committed run for `ffsplit list`."""
    measured = manifest.measurements
    return RunSummary(
        commit=commit,
        model=manifest.model.id,
        recipe=str(manifest.recipe.get("name", "")),
        keep=manifest.keep,
        size_bytes=sum(entry.size_bytes for entry in manifest.files),
        scores=measured.fidelity if measured else {},
        gates={result.gate: result.met for result in manifest.gates},
    )


def read_index(store: Store) -> Index:
    """The index as it was last written; an empty one if it is missing or invalid."""
    try:
        return read_record(Index, read_at_most(store, INDEX_NAME, MAX_INDEX_BYTES), name=INDEX_NAME)
    except NewerSchema:
        return _NEWER
    except (MissingKey, ArtifactError):
        return Index()


def list_runs(store: Store) -> list[RunSummary]:
    """Every committed run, oldest first.

    Costs a listing and one read, and two more reads per run that the index lacks.
    """
    index, present = _index_and_runs(store)
    known = [run for run in index.runs if run.commit.run_key in present]
    missing = present - {run.commit.run_key for run in known}
    new = _read_summaries(store, read_commits(store, sorted(missing)))
    runs = sorted([*known, *new], key=lambda run: run.commit.order)
    if tuple(runs) != index.runs:
        with _logged(INDEX_NAME):
            _write_index(store, runs, index=index)
    return runs


def add_to_index(store: Store, commit: Commit, manifest: Manifest) -> None:
    """Add a new commit to the index. Of two concurrent writers one may lose its entry; readers restore it.

    Raises StoreError when the store fails.
    """
    index = read_index(store)
    others = [run for run in index.runs if run.commit.run_key != commit.run_key]
    _write_index(store, [*others, summarize(commit, manifest)], index=index)


def latest_commit(store: Store) -> Commit | None:
    """The newest committed model, None if there is none. Corrects latest.json and `latest`, if it may."""
    with ThreadPoolExecutor(1) as pool:
        hinted = pool.submit(read_hint, store)
        index, present = _index_and_runs(store)
    known = [run.commit for run in index.runs if run.commit.run_key in present]
    missing = present - {commit.run_key for commit in known}
    latest = _newest_model([*known, *read_commits(store, sorted(missing))])
    if latest and read_commit(store, latest.run_key) != latest:
        latest = _newest_model(list_commits(store))
    with _logged(LATEST_NAME):
        hint = hinted.result()
        if latest and (hint is None or hint.order != latest.order or hint.attempt != latest.attempt):
            _write_hint(store, latest, after=hint)
    with _logged(LATEST_LINK):
        if latest and store.point(LATEST_LINK, f"{latest.run_key}/{latest.attempt}"):
            return latest_commit(store)  # a commit since the listing may have been pointed to before
    return latest


def move_hint(store: Store, commit: Commit) -> None:
    """Point latest.json and `latest` to a commit unless there is a newer one.

    Raises StoreError when the store fails. That `latest` cannot be made is only a warning.
    """
    hint = read_hint(store)
    if hint is None or hint.order < commit.order:
        _write_hint(store, commit, after=hint)
        try:
            store.point(LATEST_LINK, f"{commit.run_key}/{commit.attempt}")
        except FFSplitError as error:
            logs.log(f"warning: {error}", level=logging.WARNING)


def read_hint(store: Store) -> Latest | None:
    """The content of latest.json, None if it is missing or invalid.

    Raises NewerSchema for a hint of a newer schema, which this version must not replace.
    """
    try:
        return read_record(Latest, read_at_most(store, LATEST_NAME, MAX_RECORD_BYTES), name=LATEST_NAME)
    except NewerSchema:
        raise
    except (MissingKey, ArtifactError):
        return None


def _index_and_runs(store: Store) -> tuple[Index, set[str]]:
    """The index, and the keys of the runs that exist."""
    with ThreadPoolExecutor(1) as pool:
        index = pool.submit(read_index, store)
        present = set(run_keys(store))
    return index.result(), present


def _newest_model(commits: Iterable[Commit]) -> Commit | None:
    models = [commit for commit in commits if commit.kind == "model"]
    return max(models, key=lambda commit: commit.order, default=None)


def _read_summaries(store: Store, commits: list[Commit]) -> list[RunSummary]:
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(lambda commit: _read_summary(store, commit), commits))


def _read_summary(store: Store, commit: Commit) -> RunSummary:
    """The summary of a commit; without figures if its manifest is missing or not the committed one."""
    key = f"{commit.run_key}/{commit.attempt}/{MANIFEST_NAME}"
    with suppress(MissingKey, ArtifactError):
        data = read_at_most(store, key, MAX_MANIFEST_BYTES)
        if hashlib.sha256(data).hexdigest() == commit.manifest_sha256:
            return summarize(commit, Manifest.from_json(data))
    return RunSummary(commit=commit, model="?", recipe="?", keep=None, size_bytes=0, scores={}, gates={})


def _write_index(store: Store, runs: list[RunSummary], *, index: Index) -> None:
    """Write the index without the runs whose manifest could not be read: the next reader may succeed."""
    if index is _NEWER:
        return
    known = sorted((run for run in runs if run.model != "?"), key=lambda run: run.commit.order)
    data = index.model_copy(update={"runs": tuple(known)}).model_dump_json()
    store.put_bytes(INDEX_NAME, data.encode() + b"\n")


@contextmanager
def _logged(name: str) -> Iterator[None]:
    """Log a failed correction and go on: a reader may lack write permission, and does not need the result."""
    try:
        yield
    except FFSplitError as error:
        logs.log(f"{name} was not corrected", error=str(error))


def _write_hint(store: Store, commit: Commit, *, after: Latest | None) -> None:
    hint = Latest(
        run_key=commit.run_key,
        attempt=commit.attempt,
        committed_at=commit.committed_at,
        generation=(after.generation if after else 0) + 1,
    )
    store.put_bytes(LATEST_NAME, record_bytes(hint))
