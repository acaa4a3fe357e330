"""What the command line prints: tables for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ffsplit.errors import ConfigError
from ffsplit.measurement.gates import describe_result
from ffsplit.report.card import loading_line
from ffsplit.report.humanize import (
    described,
    duration,
    layout,
    load_in_words,
    milliseconds,
    noise,
    number,
    percent,
    score,
    score_change,
    shape,
    size,
    spread_in_words,
    times,
    unchanged_in_words,
    unit,
)
from ffsplit.store.aliases import aliases
from ffsplit.store.benchmark_records import BenchmarkRecord, Timing
from ffsplit.store.commits import RunSummary, latest_commit, list_runs
from ffsplit.store.entries import LATEST_LINK, MANIFEST_NAME
from ffsplit.store.gc import Plan, Removal, pinned_runs
from ffsplit.store.manifest import REPORT_NAME, Latency, Manifest, Measurements
from ffsplit.store.store import Store

if TYPE_CHECKING:
    from ffsplit.forecasts import FFNGroup, Inspection, LayerForecast, Plans
    from ffsplit.run.needs import Needs
    from ffsplit.splitting.latency import LatencyTable


WIDTH = 100


def print_manifest(manifest: Manifest, *, out: str, refused_report: str | None = None) -> None:
    """Before and after, the gates, where the artifact and its report are, and the line that loads it.

    `refused_report` is the report's key below `out` if the gates refused the artifact.
    """
    where = f"{out.rstrip('/')}/{manifest.run_key}/{manifest.attempt}"
    if manifest.measurements is not None:
        _print(_before_after(manifest, manifest.measurements))
        if disturbed := noise(manifest.measurements.latency, manifest.measurements.load):
            print(f"warning: {disturbed}".replace("\u00a0", " "))
        for skipped in manifest.measurements.skipped:
            print(f"not measured: {skipped}")
        overlaps = {task.spec: task.overlap_with_calibration for task in manifest.measurements.tasks}
        for spec, count in overlaps.items():
            if count:
                print(f"warning: {count:,} evaluation sentences of {spec} are in the calibration text too")
    for result in manifest.gates:
        print(describe_result(result))
    if refused_report is not None:
        print(f"report:   {out.rstrip('/')}/{refused_report}")
        return
    print(f"artifact: {where}")
    print(f"report:   {where}/{REPORT_NAME}")
    if manifest.kind == "model":
        print(loading_line(manifest, _place(manifest, out.rstrip("/"))))


def _place(manifest: Manifest, out: str) -> str:
    """`latest` below `out`, if that is this artifact, else its own directory or URI."""
    own = f"{manifest.run_key}/{manifest.attempt}"
    if manifest.path is None:
        return f"{out}/{own}"
    root = manifest.path.parent.parent
    shown = out if Path(out).absolute() == root else root  # no program but this knows ~ and file://
    with suppress(OSError):  # another run may be newer
        if os.path.samefile(root / LATEST_LINK / MANIFEST_NAME, manifest.path / MANIFEST_NAME):
            return f"{shown}/{LATEST_LINK}"
    return f"{shown}/{own}"


def _before_after(manifest: Manifest, measured: Measurements) -> Table:
    title = f"{manifest.model.id}, recipe {manifest.recipe['name']}, keep {manifest.keep:.4g}"
    table = _table(title, "", "original", "compressed", "")
    before, after = measured.original_size, measured.compressed_size
    pairs = (
        ("parameters", before.num_parameters, after.num_parameters),
        (
            "  in the blocks",
            before.num_parameters_without_embeddings,
            after.num_parameters_without_embeddings,
        ),
    )
    for name, a, b in pairs:
        table.add_row(name, f"{a:,}", f"{b:,}", f"{b / a - 1:+.1%}")
    table.add_row(
        "weights",
        size(before.file_bytes),
        size(after.file_bytes),
        _change(before.file_bytes, after.file_bytes),
    )
    peaks = (measured.original_peak_memory_bytes, measured.compressed_peak_memory_bytes)
    if peaks[0] is not None and peaks[1] is not None:
        table.add_row("peak memory", size(peaks[0]), size(peaks[1]), _change(peaks[0], peaks[1]))
    for each in measured.latency:
        _add_latency(table, each)
    for name, value in measured.fidelity.items():
        table.add_row(name.replace("_", " "), "", f"{value:.5f}", "")
    for task in measured.tasks:
        table.add_row(
            f"{task.name}, {task.metric.replace('_', ' ')}",
            score(task.original),
            score(task.compressed),
            score_change(task.original, after=task.compressed),
        )
    return table


def print_needs(needs: Needs, *, asked: int | None) -> None:
    """What a run would need: memory and time per stage, disk, and the line that the run begins with."""
    from ffsplit.models.folder import left_out_in_one_line
    from ffsplit.run.needs import in_one_line

    title = f"a model of {size(needs.model_bytes)}"
    table = _table(title, "stage", "workers", "memory of one", "available", "about")
    for stage in needs.stages:
        available = "not known" if stage.available_bytes is None else size(stage.available_bytes)
        about = "not known" if stage.seconds is None else duration(stage.seconds)
        streamed = {"calibrate": needs.block_by_block, "measure": needs.measured_block_by_block}
        name = f"{stage.name}, block by block" if streamed.get(stage.name) else stage.name
        table.add_row(name, str(stage.num_workers), size(stage.memory_bytes), available, about)
    totals = needs.totals
    seconds = "not known" if totals.seconds is None else duration(totals.seconds)
    table.add_section()
    table.add_row("total", "", size(totals.memory_bytes), "", seconds)
    _print(table)
    for what, disk in needs.disks.items():
        free = "" if disk.free_bytes is None else f", {size(disk.free_bytes)} free"
        print(f"{what}: {size(disk.needed_bytes)} in {disk.place}{free}".replace("\u00a0", " "))
    if needs.artifact_bytes:
        print(f"the artifact: {size(needs.artifact_bytes)} of weights".replace("\u00a0", " "))
    if line := left_out_in_one_line(needs.left_out):
        print(line)
    print(in_one_line(needs, asked=asked))


def print_inspection(found: Inspection) -> None:
    """The FFNs of a model, and what each budget would give."""
    share = found.ffn_elements / found.num_parameters
    print(f"{found.architecture} ({found.model_type}): {len(found.shapes)} FFNs")
    print(f"parameters {found.num_parameters:,}, FFNs {found.ffn_elements:,} ({percent(share)})")
    table = _table("FFNs", "", "number", "sizes", "activation", "biases", "of all parameters")
    for group in found.groups:
        shape = group.shape
        sizes = f"{shape.hidden_size} -> {shape.num_neurons} -> {shape.hidden_size}"
        has = [name for name, there in (("up", shape.up_bias), ("down", shape.down_bias)) if there]
        count = f"{group.num_ffns}" if group.num_ffns == group.num_blocks else _in_blocks(group)
        gated = ", gated" if shape.gated else ""
        part = percent(group.num_elements / found.num_parameters)
        table.add_row(group.what, count, sizes, group.activation + gated, ", ".join(has) or "none", part)
    _print(table)
    about = found.ffn_elements - sum(each.num_elements for each in found.left_out_ffns)
    if unchanged := unchanged_in_words(found.left_out_ffns, ffn_elements=about):
        print(unchanged)
    table = _table(
        f"recipe {found.recipe}", "--keep", "an FFN becomes", "parameters", "in the blocks", "plain"
    )
    for each in found.budgets:
        blocks = each.num_parameters_without_embeddings / found.num_parameters_without_embeddings - 1
        plain = "yes" if each.plain else "no"
        layouts = " / ".join(dict.fromkeys(map(layout, each.layouts))) + _experts(each.experts_per_block)
        row = (f"{each.keep:g}", layouts, f"{each.num_parameters:,}", f"{blocks:+.1%}", plain)
        table.add_row(*row)
    _print(table)


def _experts(left: int | None) -> str:
    return "" if left is None else f", {left} experts per block"


def _in_blocks(group: FFNGroup) -> str:
    return f"{group.num_ffns} in {group.num_blocks} blocks"


def _add_latency(table: Table, each: Latency) -> None:
    name = f"{each.batch_size} x {each.num_tokens} tokens, p50"
    ratio = times(each.speedup) + (f" ({spread_in_words(each.spread)})" if each.spread else "")
    table.add_row(name, milliseconds(each.original_p50_ms), milliseconds(each.compressed_p50_ms), ratio)


def _change(before: int, after: int) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _print(table: Table) -> None:
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def print_latency_table(measured: LatencyTable) -> None:
    """Milliseconds per width."""
    where = f"{measured.hardware['processor']}, {measured.num_threads} threads, {measured.dtype}"
    shape = f"{measured.batch_size} x {measured.num_tokens} tokens"
    columns = ("FFN width", "measured", "fitted", "of the original's")
    table = _table(f"{measured.model}, {shape}\n{where}", *columns)
    dense = measured.ms(measured.points[-1].width)
    for point in measured.points:
        fitted = measured.ms(point.width)
        table.add_row(
            f"{point.width:,}", milliseconds(point.ms), milliseconds(fitted), percent(fitted / dense)
        )
    _print(table)


def print_plans(plans: Plans) -> None:
    """Budgets side by side, then each layer, then what the predicted error means."""
    print(f"{plans.model}, recipe {plans.recipe}, every layer alike; from {plans.statistics}")
    table = _table("budgets", "", "keep", "parameters", "FFN bytes", "forward", "plain", "predicted error")
    before = (f"{plans.num_parameters:,}", size(plans.ffn_bytes), "", "", "")
    table.add_row("original", "1", *before)
    for each in plans.budgets:
        change = each.num_parameters / plans.num_parameters - 1
        table.add_row(
            str(each.budget),
            f"{each.keep:.4g}{_experts(each.experts_per_block)}",
            f"{each.num_parameters:,} ({change:+.1%})",
            size(each.ffn_bytes),
            "" if each.latency_ms is None else milliseconds(each.latency_ms),
            "yes" if each.plain else "no",
            percent(each.energy_outside),
        )
    _print(table)
    budgets = [str(each.budget) for each in plans.budgets]
    units = unit((spread.name, spread.layer) for spread in plans.concentration)
    table = _table(
        f"{units}s: layout, heavy hitters, predicted error", "", "neurons for 50 / 90 / 99 %", *budgets
    )
    for spread in plans.concentration:
        counts = " / ".join(f"{count:,}" for count in spread.neurons_for_energy.values())
        cells = [_forecast(each.layers[spread.layer]) for each in plans.budgets]
        table.add_row(spread.name, f"{counts} of {spread.num_neurons:,}", *cells)
    _print(table)
    print(
        "predicted error: fraction of an FFN's output energy (the sum over its neurons) outside the heavy\n"
        "hitters; it ignores what refits, low-rank parts and later layers recover"
    )


def _forecast(layer: LayerForecast) -> str:
    """Layout, number of heavy hitters (unless they are all neurons) and predicted error, one per line."""
    lines = [layout(layer.layout), percent(layer.energy_outside)]
    if len(layer.heavy_neurons) < layer.layout.num_neurons:
        lines.insert(1, f"{len(layer.heavy_neurons):,} heavy")
    return "\n".join(lines)


# What `ffsplit list` and `ffsplit gc` print.

COLUMNS = ("run", "committed", "kind", "model", "recipe", "keep", "size", "scores", "gates", "")


def _runs(store: Store) -> list[tuple[RunSummary, list[str]]]:
    """Every run, newest first, with its labels: `latest`, aliases, `pinned`. Raises ConfigError if none."""
    runs = list_runs(store)
    if not runs:
        raise ConfigError(f"{store.uri} holds no committed run: give the --out that runs were published to")
    pinned, latest, in_use = pinned_runs(store), latest_commit(store), aliases(store)
    named = []
    for run in reversed(runs):
        names = ["latest"] if run.commit == latest else []
        names += [f"@{alias}" for alias, change in in_use.items() if change.run_key == run.commit.run_key]
        names += ["pinned"] if run.commit.run_key in pinned else []
        named.append((run, names))
    return named


def list_to_json(store: Store) -> str:
    """One JSON array, newest run first."""
    rows = []
    for run, names in _runs(store):
        fields = run.commit.model_dump(exclude={"schema_version"}) | run.model_dump(exclude={"commit"})
        named = [name.removeprefix("@") for name in names if name.startswith("@")]
        rows.append(fields | {"latest": "latest" in names, "pinned": "pinned" in names, "aliases": named})
    return json.dumps(rows, indent=2)


def print_list(store: Store) -> None:
    """One row per run, newest first: plain columns, whatever the width of the terminal."""
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
        print(f"{verb} the leftovers of {planned.num_leftovers} broken uploads")
    total = size(sum(each.size_bytes for each in done))
    print(f"{verb} {len(rows)} attempts, {total}; {len(planned.kept)} runs are kept")
    if removed is None:
        print("dry run, nothing was removed: --delete removes it")


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# The table of `ffsplit benchmark`.

BENCHMARK_WIDTH = 110


def print_benchmark(record: BenchmarkRecord) -> None:
    """Both models at each shape, beside the largest speed-up that the removed work allows."""
    title = f"{record.device}, {record.dtype}, {record.num_threads} threads, timed alternately"
    table = Table("", "original", "compressed", "speed-up", "limit", "share", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for timing in record.timings:
        _add(table, timing)
    before, after = record.original, record.compressed
    loads = [milliseconds(1e3 * each.load_s) for each in (before, after)]
    table.add_row("load", *loads, times(before.load_s / after.load_s))
    if before.peak_memory_bytes is not None and after.peak_memory_bytes is not None:
        table.add_row("peak memory", size(before.peak_memory_bytes), size(after.peak_memory_bytes))
    Console(width=BENCHMARK_WIDTH).print(table)
    if record.load is not None:
        print(load_in_words(record.load))
    if disturbed := described(_tails(record), record.load):
        print(f"warning: {disturbed}".replace("\u00a0", " "))


def _tails(record: BenchmarkRecord) -> dict[str, float]:
    """p95 / p50 of every model at every shape."""
    return {
        f"{each.phase} at {shape(each.batch_size, num_tokens=each.num_tokens)}: the {name}'s": (
            figures.p95_ms / figures.p50_ms
        )
        for each in record.timings
        for name, figures in (("original", each.original), ("compressed model", each.compressed))
    }


def _add(table: Table, timing: Timing) -> None:
    first, second = timing.original, timing.compressed
    table.add_row(
        f"{timing.phase} {timing.batch_size} x {timing.num_tokens}, p50",
        milliseconds(first.p50_ms),
        milliseconds(second.p50_ms),
        times(timing.speedup),
        f"{times(timing.limit)} by {timing.limited_by}",
        f"{timing.share_of_limit:.0%}",
    )
    notes = {"p95": spread_in_words(timing.spread), "p99": ""}
    for name, note in notes.items():
        figures = (getattr(each, f"{name}_ms") for each in (first, second))
        table.add_row(f"  {name}", *map(milliseconds, figures), note)
    table.add_row("  tokens/s", number(first.tokens_per_s), number(second.tokens_per_s))
