"""What the command line prints of aliases."""

from __future__ import annotations

import json

from ffsplit.errors import ConfigError
from ffsplit.store.aliases import AliasChange, history, unknown_alias
from ffsplit.store.store import Store


def describe_change(store: Store, change: AliasChange) -> str:
    """One line: what the alias names, and what it named before."""
    name = f"{store.uri}@{change.alias}"
    before = "" if change.from_run is None else f" (before: {change.from_run})"
    if change.run_key is None:
        return f"{name} is removed{before}; its history stays"
    return f"{name} names run {change.run_key}{before}"


def print_history(store: Store, alias: str) -> None:
    """Every change of an alias, newest first: when, which run, from which, and who."""
    for change in reversed(_changes(store, alias)):
        run = change.run_key or "removed"
        before = change.from_run or "nothing"
        when = change.changed_at[:19].replace("T", " ")
        print(f"{change.number:>4}  {when}  {run:<16}  from {before:<16}  {change.changed_by}")


def history_to_json(store: Store, alias: str) -> str:
    """One JSON array, newest change first."""
    changes = reversed(_changes(store, alias))
    return json.dumps([each.model_dump(exclude={"schema_version", "id"}) for each in changes], indent=2)


def _changes(store: Store, alias: str) -> list[AliasChange]:
    changes = history(store, alias)
    if not changes:
        raise ConfigError(unknown_alias(store, alias))
    return changes
