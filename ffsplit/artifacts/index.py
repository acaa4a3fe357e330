"""What is committed in a store, at a glance: index.json, a copy of the commits, and latest.json, a hint.

Commits never change, so a copy of one is as good as itself. Whoever finds the index behind the runs
that are there reads what is missing and mends it; whoever cannot write it goes on without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal

from pydantic import Field, ValidationError

from ffsplit.artifacts.commits import (
    MAX_RECORD_BYTES,
    NUM_READERS,
    Commit,
    Named,
    list_commits,
    read_commit,
    read_commits,
    record_bytes,
    run_keys,
)
from ffsplit.artifacts.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ffsplit.artifacts.stores import MissingKey, Store, read_at_most
from ffsplit.config import Record
from ffsplit.errors import ArtifactError, FFSplitError, StoreError

INDEX_NAME = "index.json"
LATEST_NAME = "latest.json"
MAX_INDEX_BYTES = 256 << 20


class Latest(Named):
    """The hint at the root of a store. The generation counts how often it was moved."""

    generation: int = Field(default=0, ge=0)


class RunSummary(Record):
    """One committed run as `ffsplit list` shows it. None is what its manifest does not tell."""

    commit: Commit
    model: str
    recipe: str
    keep: float | None
    size_bytes: int = Field(description="of every file of the artifact")
    scores: dict[str, float]
    gates: dict[str, bool]


class Index(Record):
    """Every commit that its writer knew of, oldest first."""

    schema_version: Literal[1] = 1
    runs: tuple[RunSummary, ...] = ()


def summarize(commit: Commit, manifest: Manifest) -> RunSummary:
    """What the list shows of a manifest."""
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
    """The index as it was last written; an empty one when it is missing or cannot be understood."""
    try:
        return Index.model_validate_json(read_at_most(store, INDEX_NAME, MAX_INDEX_BYTES))
    except (MissingKey, ValidationError):
        return Index()


def list_runs(store: Store) -> list[RunSummary]:
    """Every committed run, oldest first. Costs a listing, one read, and two more a run not in the index."""
    index, present = _index_and_runs(store)
    known = [run for run in index.runs if run.commit.run_key in present]
    missing = present - {run.commit.run_key for run in known}
    new = _read_summaries(store, read_commits(store, sorted(missing)))
    runs = sorted([*known, *new], key=lambda run: run.commit.order)
    if tuple(runs) != index.runs:
        _write_index(store, runs)
    return runs


def add_to_index(store: Store, commit: Commit, manifest: Manifest) -> None:
    """Put a new commit into the index. Two writers at once lose one of both, which readers mend."""
    with suppress(FFSplitError):
        others = [run for run in read_index(store).runs if run.commit.run_key != commit.run_key]
        _write_index(store, [*others, summarize(commit, manifest)])


def latest_commit(store: Store) -> Commit | None:
    """The newest committed model, None when there is none. Mends latest.json where it may be written."""
    with ThreadPoolExecutor(1) as pool:
        hinted = pool.submit(read_hint, store)
        index, present = _index_and_runs(store)
    known = [run.commit for run in index.runs if run.commit.run_key in present]
    missing = present - {commit.run_key for commit in known}
    latest = _newest_model([*known, *read_commits(store, sorted(missing))])
    if latest and read_commit(store, latest.run_key) != latest:
        latest = _newest_model(list_commits(store))
    with suppress(FFSplitError):
        hint = hinted.result()
        if latest and (hint is None or hint.order != latest.order or hint.attempt != latest.attempt):
            _write_hint(store, latest, after=hint)
    return latest


def move_hint(store: Store, commit: Commit) -> None:
    """Point latest.json to a commit unless it names a newer one. Readers mend it, so failing is no error."""
    with suppress(FFSplitError):
        hint = read_hint(store)
        if hint is None or hint.order < commit.order:
            _write_hint(store, commit, after=hint)


def read_hint(store: Store) -> Latest | None:
    """What latest.json names, None when it is missing or cannot be understood."""
    try:
        return Latest.model_validate_json(read_at_most(store, LATEST_NAME, MAX_RECORD_BYTES))
    except (MissingKey, ValidationError):
        return None


def _index_and_runs(store: Store) -> tuple[Index, set[str]]:
    """The index, and the keys of the runs that are there."""
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
    """The summary of a commit, a bare one when its manifest is not the one committed."""
    key = f"{commit.run_key}/{commit.attempt}/{MANIFEST_NAME}"
    with suppress(StoreError, ArtifactError):
        data = read_at_most(store, key, MAX_MANIFEST_BYTES)
        if hashlib.sha256(data).hexdigest() == commit.manifest_sha256:
            return summarize(commit, Manifest.from_json(data))
    return RunSummary(commit=commit, model="?", recipe="?", keep=None, size_bytes=0, scores={}, gates={})


def _write_index(store: Store, runs: list[RunSummary]) -> None:
    """Write the index, without the runs whose manifest could not be read: perhaps the next reader can."""
    known = sorted((run for run in runs if run.model != "?"), key=lambda run: run.commit.order)
    with suppress(FFSplitError):
        store.put_bytes(INDEX_NAME, Index(runs=tuple(known)).model_dump_json().encode() + b"\n")


def _write_hint(store: Store, commit: Commit, *, after: Latest | None) -> None:
    hint = Latest(
        run_key=commit.run_key,
        attempt=commit.attempt,
        committed_at=commit.committed_at,
        generation=(after.generation if after else 0) + 1,
    )
    store.put_bytes(LATEST_NAME, record_bytes(hint))
