"""Aliases: names for the runs that are in use, which people and batches move from run to run.

    aliases/<alias>/<number>.json     one change, created only if absent; the highest number counts

So two writers never make the same change: the second one finds its number taken. Every change stays, as the
alias's history.
"""

from __future__ import annotations

import getpass
import re
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

from pydantic import Field

from ffsplit.errors import ArtifactError, ConfigError, StoreError, did_you_mean
from ffsplit.store.commits import MAX_RECORD_BYTES, NUM_READERS, Commit, read_commit, record_bytes
from ffsplit.store.entries import ATTEMPT_ID, RUN_KEY
from ffsplit.store.schema import UtcTime, Versioned, read_record
from ffsplit.store.store import MAX_ATTEMPTS, Store, read_at_most

ALIASES_PREFIX = "aliases"
ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")
RESERVED = ("latest",)
"""What `latest` names follows from the commits."""

_CHANGE = re.compile(r"(?P<alias>[^/]+)/(?P<number>[0-9]{8})\.json")
_NAMED = re.compile(
    rf"(?P<place>(?:(?!(?i:s3)://)|(?i:s3)://[^/@]+/).*)@(?P<alias>{ALIAS.pattern})", re.DOTALL
)


class AliasMoved(StoreError):
    """Another writer moved the alias first."""


class AliasChange(Versioned):
    """One change of an alias. Without `run_key`, it was removed."""

    alias: str = Field(pattern=f"^{ALIAS.pattern}$")
    number: int = Field(ge=1, description="counts the changes of this alias")
    run_key: str | None = Field(pattern=f"^{RUN_KEY.pattern}$")
    attempt: str | None = Field(pattern=f"^{ATTEMPT_ID.pattern}$")
    from_run: str | None = Field(pattern=f"^{RUN_KEY.pattern}$", description="what it named before")
    changed_at: UtcTime
    changed_by: str = Field(description="user@host, or the batch")
    id: str = Field(description="random, so that no two changes have the same bytes")


def check_alias(alias: str) -> str:
    """The name itself. Raises ConfigError if it is not a valid one."""
    if not ALIAS.fullmatch(alias):
        raise ConfigError(
            f"{alias!r} is not a valid alias: begin with a lower-case letter, and use lower-case letters, "
            "digits, '.', '_' and '-'"
        )
    if alias in RESERVED:
        raise ConfigError(f"{alias!r} always names the newest model: choose another alias")
    return alias


def split_alias(place: str) -> tuple[str, str] | None:
    """Place and alias of PLACE@ALIAS; None for anything else. A bucket's root is s3://bucket/@ALIAS."""
    match = _NAMED.fullmatch(place)
    return None if match is None else (match["place"].rstrip("/") or "/", match["alias"])


def promote(
    store: Store, commit: Commit, *, alias: str, by: str | None = None, over: AliasChange | bool | None = True
) -> AliasChange:
    """Let an alias name a committed model, and return the change; nothing changes if it does already.

    `over` is the change that the caller has seen (None: there was none): if the alias was moved since,
    AliasMoved is raised. True moves it from whatever it names. Raises ConfigError for what is not a model.
    """
    check_alias(alias)
    if commit.kind != "model":
        raise ConfigError(f"{store.uri}/{commit.run_key} holds statistics: an alias names a model")
    before = read_alias(store, alias)
    if over is not True and before != over:
        raise AliasMoved(f"{store.uri}@{alias} was moved by {_mover(before)} meanwhile: compare again")
    if before is not None and (before.run_key, before.attempt) == (commit.run_key, commit.attempt):
        return before
    change = _change(store, before, alias=alias, commit=commit, by=by, retry=over is True)
    if read_commit(store, commit.run_key) != commit:  # gc removed it before it could see the alias
        previous = None if before is None or before.run_key is None else read_commit(store, before.run_key)
        _change(store, change, alias=alias, commit=previous, by=by, retry=False)
        raise StoreError(f"{store.uri}/{commit.run_key} was removed meanwhile: promote another run")
    return change


def remove_alias(store: Store, alias: str, *, run_key: str | None = None) -> AliasChange:
    """Let an alias name nothing; its history stays.

    Raises ConfigError if it names nothing, or another run than the given one.
    """
    before = read_alias(store, check_alias(alias))
    if before is None or before.run_key is None:
        raise ConfigError(unknown_alias(store, alias))
    if run_key not in (None, before.run_key):
        raise ConfigError(f"{store.uri}@{alias} names run {before.run_key}, not {run_key}")
    return _change(store, before, alias=alias, commit=None, by=None, retry=True)


def read_alias(store: Store, alias: str) -> AliasChange | None:
    """The last change of an alias, None if there was none. Raises ArtifactError for an invalid record."""
    numbers = _numbers(store, f"{ALIASES_PREFIX}/{check_alias(alias)}").get(alias)
    return _read(store, alias, numbers[-1]) if numbers else None


def history(store: Store, alias: str) -> list[AliasChange]:
    """Every change of an alias, oldest first."""
    numbers = _numbers(store, f"{ALIASES_PREFIX}/{check_alias(alias)}").get(alias, [])
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(lambda number: _read(store, alias, number), numbers))


def aliases(store: Store) -> dict[str, AliasChange]:
    """Every alias that names a run, by name. Costs one listing and one read per alias."""
    numbers = _numbers(store, ALIASES_PREFIX)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = pool.map(lambda alias: _read(store, alias, numbers[alias][-1]), sorted(numbers))
        return {change.alias: change for change in found if change.run_key is not None}


def aliased_runs(store: Store) -> set[str]:
    """The keys of the runs that aliases name."""
    return {change.run_key for change in aliases(store).values() if change.run_key is not None}


def unknown_alias(store: Store, alias: str) -> str:
    """The message for an alias that names nothing."""
    known = sorted(aliases(store))
    if not known:
        return f"{store.uri} has no alias {alias!r}: `ffsplit promote {store.uri} --as {alias}` makes it"
    return f"{store.uri} has no alias {alias!r}{did_you_mean(alias, known) or '; it has ' + ', '.join(known)}"


def _change(
    store: Store,
    before: AliasChange | None,
    *,
    alias: str,
    commit: Commit | None,
    by: str | None,
    retry: bool,
) -> AliasChange:
    """Write the next change. If another writer was first, write the one after that, or raise AliasMoved."""
    for _ in range(MAX_ATTEMPTS if retry else 1):
        change = AliasChange(
            alias=alias,
            number=1 if before is None else before.number + 1,
            run_key=None if commit is None else commit.run_key,
            attempt=None if commit is None else commit.attempt,
            from_run=None if before is None else before.run_key,
            changed_at=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            changed_by=by or this_user(),
            id=secrets.token_hex(8),
        )
        store.put_if_absent(_key(alias, change.number), record_bytes(change))
        before = _read(store, alias, change.number)  # as a commit is: the content tells who was first
        if before == change:
            return change
    raise AliasMoved(f"{store.uri}@{alias} was moved by {_mover(before)} meanwhile: try again")


def _mover(change: AliasChange | None) -> str:
    return "another writer" if change is None else change.changed_by


def _numbers(store: Store, prefix: str) -> dict[str, list[int]]:
    """The numbers of the changes below a prefix, in order, by alias."""
    found: dict[str, list[int]] = {}
    for key in store.list(prefix):
        match = _CHANGE.fullmatch(key.removeprefix(f"{ALIASES_PREFIX}/"))
        if match and ALIAS.fullmatch(match["alias"]):
            found.setdefault(match["alias"], []).append(int(match["number"]))
    return found


def _key(alias: str, number: int) -> str:
    return f"{ALIASES_PREFIX}/{alias}/{number:08d}.json"


def _read(store: Store, alias: str, number: int) -> AliasChange:
    key = _key(alias, number)
    change = read_record(AliasChange, read_at_most(store, key, MAX_RECORD_BYTES), name=f"{store.uri}/{key}")
    if (change.alias, change.number) != (alias, number):
        raise ArtifactError(f"{store.uri}/{key} is a change of {change.alias!r}, number {change.number}")
    return change


def this_user() -> str:
    """Who this process runs as: user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
