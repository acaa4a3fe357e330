"""Garbage collection: old runs, attempts that were never committed, and leftovers of broken runs.

Never removed: the newest model, which `latest` names; runs that aliases name; pinned runs; a scratch in use;
and uncommitted files written to within `min_age`, since a run may still be working on them.

    pins/<run key>.json      keeps that run
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone

from ffsplit import logs
from ffsplit.config import Record
from ffsplit.errors import ConfigError, FFSplitError, begun
from ffsplit.store.aliases import aliased_runs
from ffsplit.store.artifact import Location
from ffsplit.store.benchmark_records import BENCHMARKS_FOLDER
from ffsplit.store.commits import (
    COMMIT_NAME,
    Commit,
    Named,
    latest_commit,
    list_runs,
    read_commit,
    record_bytes,
)
from ffsplit.store.entries import ATTEMPT_ID, RUN_KEY
from ffsplit.store.links import SHARES_PREFIX, has_expired
from ffsplit.store.scratch import SCRATCH_PREFIX, holders
from ffsplit.store.store import Store, Stored

PINS_PREFIX = "pins"
DEFAULT_MIN_AGE = timedelta(days=1)


class Removal(Record):
    """One prefix to remove, and why. `commit` is removed first, so that no reader finds half a run."""

    prefix: str
    reason: str
    num_files: int
    size_bytes: int
    commit: Commit | None = None


class Plan(Record):
    """What a collection would remove and keep."""

    kept: tuple[str, ...]
    removals: tuple[Removal, ...]
    num_leftovers: int
    leftovers_before: datetime


def pin(location: Location) -> str:
    """Protect a committed run from collection; returns its run key.

    Raises ConfigError if the run is not committed.
    """
    if location.commit is None:
        raise ConfigError(f"{location.uri} is not committed: only a committed run can be pinned")
    named = location.commit
    record = Named(run_key=named.run_key, attempt=named.attempt, committed_at=named.committed_at)
    location.store.put_bytes(_pin_key(named.run_key), record_bytes(record))
    return named.run_key


def unpin(location: Location) -> str:
    """Remove a run's pin; returns its run key. Raises ConfigError if it is not pinned."""
    run_key = location.run_key or ""
    if not run_key or not location.store.exists(_pin_key(run_key)):
        raise ConfigError(f"{location.uri} is not pinned")
    location.store.delete(_pin_key(run_key))
    return run_key


def pinned_runs(store: Store) -> set[str]:
    """The run keys that pins name."""
    names = [key.removeprefix(f"{PINS_PREFIX}/").removesuffix(".json") for key in store.list(PINS_PREFIX)]
    return {name for name in names if RUN_KEY.fullmatch(name)}


def plan(store: Store, *, keep_last: int, min_age: timedelta = DEFAULT_MIN_AGE) -> Plan:
    """Plan what to remove. Keeps the `keep_last` newest models, and the same number of statistics.

    Raises ConfigError for a negative number.
    """
    if keep_last < 0:
        raise ConfigError(f"--keep-last {keep_last}: give 0 or more")
    now = datetime.now(timezone.utc)
    before = now - min_age
    commits = [run.commit for run in list_runs(store)]
    latest = latest_commit(store)
    kept = pinned_runs(store) | aliased_runs(store) | ({latest.run_key} if latest else set())
    for kind in ("model", "statistics"):
        newest = [commit.run_key for commit in commits if commit.kind == kind]
        kept |= set(newest[len(newest) - keep_last :] if keep_last < len(newest) else newest)
    by_prefix = _by_prefix(store.list_details(""))
    committed = {commit.run_key: commit for commit in commits}
    removals = []
    for prefix, entries in sorted(by_prefix.items()):
        commit = committed.get(prefix.split("/")[0])
        is_winner = commit is not None and prefix == f"{commit.run_key}/{commit.attempt}"
        if _is_held(prefix, entries):
            continue
        if prefix.startswith(SHARES_PREFIX):
            if has_expired(prefix.partition("/")[2], datetime.now(timezone.utc)):
                removals.append(_removal(prefix, entries, commit=None))
            continue
        in_use = any(abs(now - entry.modified_at) <= min_age for entry in entries)  # clocks may go back
        if (is_winner and commit and commit.run_key not in kept) or (not is_winner and not in_use):
            removals.append(_removal(prefix, entries, commit=commit if is_winner else None))
    leftovers = store.remove_leftovers(before, dry_run=True)
    going = {removal.commit.run_key for removal in removals if removal.commit}
    return Plan(
        kept=tuple(sorted(committed.keys() - going)),
        removals=tuple(removals),
        num_leftovers=leftovers,
        leftovers_before=before,
    )


def collect(store: Store, planned: Plan) -> list[Removal]:
    """Remove what was planned, and return what was removed.

    Kept after all: a run that was pinned or promoted, was committed or became the newest since the plan was
    made, and a scratch that a run uses now.
    """
    with begun():
        return _collect(store, planned)


def _collect(store: Store, planned: Plan) -> list[Removal]:
    removed = []
    for removal in planned.removals:
        run_key, _, attempt = removal.prefix.partition("/")
        if removal.commit:
            latest = latest_commit(store)
            if _is_named(store, run_key) or (latest and latest.run_key == run_key):
                continue
            store.delete(f"{run_key}/{COMMIT_NAME}")
            if _is_named(store, run_key):  # since the look above; from here on a promotion sees it gone
                store.put_if_absent(f"{run_key}/{COMMIT_NAME}", record_bytes(removal.commit))
                continue
            store.delete_prefix(f"{run_key}/{BENCHMARKS_FOLDER}")
        elif _is_held(removal.prefix, store.list_details(removal.prefix)):
            continue
        elif RUN_KEY.fullmatch(run_key):
            standing = read_commit(store, run_key)
            if standing and standing.attempt == attempt:
                continue
        store.delete_prefix(removal.prefix)
        removed.append(removal)
    store.remove_leftovers(planned.leftovers_before, dry_run=False)
    try:
        list_runs(store)
        latest_commit(store)
    except FFSplitError as error:
        logs.log(f"warning: {store.uri}: the list of runs is not up to date: {error}", level=logging.WARNING)
    return removed


def _is_named(store: Store, run_key: str) -> bool:
    return store.exists(_pin_key(run_key)) or run_key in aliased_runs(store)


def _by_prefix(entries: Iterable[Stored]) -> dict[str, list[Stored]]:
    """The files of each attempt, of each run's scratch and of each share. Other files are not ours."""
    found: dict[str, list[Stored]] = {}
    for entry in entries:
        first, _, rest = entry.key.partition("/")
        second = rest.partition("/")[0]
        is_attempt = RUN_KEY.fullmatch(first) and ATTEMPT_ID.fullmatch(second)
        if is_attempt or (first == SCRATCH_PREFIX and RUN_KEY.fullmatch(second)) or first == SHARES_PREFIX:
            found.setdefault(f"{first}/{second}", []).append(entry)
    return found


def _is_held(prefix: str, entries: Iterable[Stored]) -> bool:
    """Whether this is a scratch in use. The age of its files does not matter."""
    return prefix.startswith(f"{SCRATCH_PREFIX}/") and bool(holders(entries, now=datetime.now(timezone.utc)))


def _removal(prefix: str, entries: list[Stored], *, commit: Commit | None) -> Removal:
    orphan = {SCRATCH_PREFIX: "resume state", SHARES_PREFIX: "expired links"}.get(
        prefix.partition("/")[0], "never committed"
    )
    return Removal(
        prefix=prefix,
        reason=f"{commit.kind} of {commit.committed_at[:10]}" if commit else orphan,
        num_files=len(entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
        commit=commit,
    )


def _pin_key(run_key: str) -> str:
    return f"{PINS_PREFIX}/{run_key}.json"
