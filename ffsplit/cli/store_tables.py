"""What `ffsplit list` and `ffsplit gc` print."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ffsplit.artifacts.index import RunSummary, latest_commit, list_runs
from ffsplit.artifacts.retention import Plan, Removal, pinned_runs
from ffsplit.artifacts.stores import Store
from ffsplit.errors import ConfigError
from ffsplit.report.humanize import size

COLUMNS = ("run", "committed", "kind", "model", "recipe", "keep", "size", "scores", "gates", "")


def _runs(store: Store) -> list[tuple[RunSummary, list[str]]]:
    """Every run, newest first, and what names it: `latest`, `pinned`. Raises ConfigError without any."""
    runs = list_runs(store)
    if not runs:
        raise ConfigError(f"{store.uri} holds no committed run: give the place that runs were published to")
    pinned, latest = pinned_runs(store), latest_commit(store)
    named = []
    for run in reversed(runs):
        names = ["latest"] if run.commit == latest else []
        names += ["pinned"] if run.commit.run_key in pinned else []
        named.append((run, names))
    return named


def list_to_json(store: Store) -> str:
    """One JSON array, newest run first."""
    rows = []
    for run, names in _runs(store):
        fields = run.commit.model_dump(exclude={"schema_version"}) | run.model_dump(exclude={"commit"})
        rows.append(fields | {"latest": "latest" in names, "pinned": "pinned" in names})
    return json.dumps(rows, indent=2)


def print_list(store: Store) -> None:
    """One row a run, newest first: plain columns, whatever the width of the terminal."""
    rows = [COLUMNS, *(_row(run, names) for run, names in _runs(store))]
    _print_columns(rows)


def _row(run: RunSummary, names: list[str]) -> tuple[str, ...]:
    commit = run.commit
    passed = {True: "passed", False: "FAILED"}
    return (
        commit.run_key,
        commit.committed_at[:16].replace("T", " "),
        commit.kind,
        run.model,
        run.recipe,
        "" if run.keep is None else f"{run.keep:.4g}",
        size(run.size_bytes),
        " ".join(f"{name}={value:.4g}" for name, value in run.scores.items()),
        " ".join(f"{name}:{passed[value]}" for name, value in run.gates.items()),
        ",".join(names),
    )


def print_plan(planned: Plan, *, removed: Sequence[Removal] | None) -> None:
    """What would be removed, or what was."""
    done = planned.removals if removed is None else removed
    verb = "would remove" if removed is None else "removed"
    rows = [
        (verb, each.prefix, each.reason, f"{each.num_files} files", size(each.size_bytes)) for each in done
    ]
    if rows:
        _print_columns(rows)
    if planned.num_leftovers:
        print(f"{verb} what {planned.num_leftovers} broken uploads left")
    total = size(sum(each.size_bytes for each in done))
    print(f"{verb} {len(rows)} attempts, {total}; {len(planned.kept)} runs stay")
    if removed is None:
        print("nothing was touched: --delete does it")


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
