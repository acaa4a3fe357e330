"""What the command line prints: tables for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.cli.columns import Table, print_sentence, whole
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
    unit,
)
from ffsplit.store.aliases import aliases
from ffsplit.store.benchmark_records import BenchmarkRecord, Timing
from ffsplit.store.commits import RunSummary, latest_commit, list_runs
from ffsplit.store.entries import LATEST_LINK, MANIFEST_NAME
from ffsplit.store.gc import Plan, Removal, pinned_runs
from ffsplit.store.manifest import REPORT_NAME, Latency, Manifest, Measurements
from ffsplit.store.store import Store
from ffsplit.zoo.batch import BATCHES_PREFIX, INDEX_NAME

if TYPE_CHECKING:
    from ffsplit.forecasts import BudgetForecast, LayerForecast, Plans
    from ffsplit.run.needs import Needs
    from ffsplit.splitting.latency import LatencyTable


def print_manifest(manifest: Manifest, *, out: str, refused_report: str | None = None) -> None:
    """Before and after, the gates, where the artifact and its report are, and the line that loads it.

    `refused_report` is the report's key below `out` if the gates refused the artifact.
    """
    where = f"{out.rstrip('/')}/{manifest.run_key}/{manifest.attempt}"
    if manifest.measurements is not None:
        _before_after(manifest, manifest.measurements).print()
        if disturbed := noise(manifest.measurements.latency, manifest.measurements.load):
            print_sentence(f"warning: {disturbed}")
        for skipped in manifest.measurements.skipped:
            print_sentence(f"not measured: {skipped}")
        overlaps = {task.spec: task.overlap_with_calibration for task in manifest.measurements.tasks}
        for spec, count in overlaps.items():
            if count:
                print_sentence(
                    f"warning: {count:,} evaluation sentences of {spec} are in the calibration text too"
                )
    for result in manifest.gates:
        print_sentence(describe_result(result))
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
    table = Table(title, ("", "original", "compressed", "change"))
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
        table.add(name, f"{a:,}", f"{b:,}", f"{b / a - 1:+.1%}")
    table.add(
        "weights",
        size(before.file_bytes),
        size(after.file_bytes),
        _change(before.file_bytes, after.file_bytes),
    )
    peaks = (measured.original_peak_memory_bytes, measured.compressed_peak_memory_bytes)
    if peaks[0] is not None and peaks[1] is not None:
        table.add("peak memory", size(peaks[0]), size(peaks[1]), _change(peaks[0], peaks[1]))
    for each in measured.latency:
        _add_latency(table, each)
    for name, value in measured.fidelity.items():
        table.add(name.replace("_", " "), "", f"{value:.5f}", "")
    for task in measured.tasks:
        table.add(
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
    table = Table(title, ("stage", "workers", "memory of one", "available", "about"))
    for stage in needs.stages:
        available = "not known" if stage.available_bytes is None else size(stage.available_bytes)
        about = "not known" if stage.seconds is None else duration(stage.seconds)
        streamed = {"calibrate": needs.block_by_block, "measure": needs.measured_block_by_block}
        name = f"{stage.name}, block by block" if streamed.get(stage.name) else stage.name
        table.add(name, str(stage.num_workers), size(stage.memory_bytes), available, about)
    totals = needs.totals
    seconds = "not known" if totals.seconds is None else duration(totals.seconds)
    table.add_rule()
    table.add("total", "", size(totals.memory_bytes), "", seconds)
    table.print()
    for what, disk in needs.disks.items():
        free = "" if disk.free_bytes is None else f", {size(disk.free_bytes)} free"
        print_sentence(f"{what}: {size(disk.needed_bytes)} in {disk.place}{free}")
    if needs.artifact_bytes:
        print_sentence(f"the artifact: {size(needs.artifact_bytes)} of weights")
    if line := left_out_in_one_line(needs.left_out):
        print_sentence(line)
    print_sentence(in_one_line(needs, asked=asked))


def experts_in_words(left: int | None) -> str:
    return "" if left is None else f", {left} experts per block"


def _add_latency(table: Table, each: Latency) -> None:
    name = f"{each.batch_size} x {each.num_tokens} tokens, p50"
    ratio = times(each.speedup) + (f" ({spread_in_words(each.spread)})" if each.spread else "")
    table.add(name, milliseconds(each.original_p50_ms), milliseconds(each.compressed_p50_ms), ratio)


def _change(before: int, after: int) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def print_latency_table(measured: LatencyTable) -> None:
    """Milliseconds per width."""
    where = f"{measured.hardware['processor']}, {measured.num_threads} threads, {measured.dtype}"
    shape = f"{measured.batch_size} x {measured.num_tokens} tokens"
    columns = ("FFN width", "measured", "fitted", "of the original's")
    table = Table(f"{measured.model}, {shape}; {where}", columns)
    dense = measured.ms(measured.points[-1].width)
    for point in measured.points:
        fitted = measured.ms(point.width)
        table.add(f"{point.width:,}", milliseconds(point.ms), milliseconds(fitted), percent(fitted / dense))
    table.print()


def print_plans(plans: Plans) -> None:
    """Budgets side by side, then each layer, then what the predicted error means."""
    print_sentence(f"{plans.model}, recipe {plans.recipe}, every layer alike; from {plans.statistics}")
    print()
    table = Table("", ("budget", "keep", "parameters", "FFN bytes", "forward", "plain", "predicted error"))
    table.add("original", "1", f"{plans.num_parameters:,}", size(plans.ffn_bytes))
    for each in plans.budgets:
        change = each.num_parameters / plans.num_parameters - 1
        table.add(
            str(each.budget),
            f"{each.keep:.4g}{_lost(each)}{experts_in_words(each.experts_per_block)}",
            f"{each.num_parameters:,} ({change:+.1%})",
            size(each.ffn_bytes),
            "" if each.latency_ms is None else milliseconds(each.latency_ms),
            "yes" if each.plain else "no",
            percent(each.energy_outside),
        )
    table.print()
    if any(map(_lost, plans.budgets)):
        print_sentence(
            "of: what the budget allows if widths and ranks are not rounded, as with --width-multiple 1"
        )
    budgets = [whole(str(each.budget)) for each in plans.budgets]
    units = unit((spread.name, spread.layer) for spread in plans.concentration)
    print()
    table = Table(
        "layout, heavy hitters and predicted error of each budget",
        (units, "neurons for 50 / 90 / 99\u00a0%", *budgets),
    )
    for spread in plans.concentration:
        counts = whole(" / ".join(f"{count:,}" for count in spread.neurons_for_energy.values()))
        cells = [_forecast(each.layers[spread.layer]) for each in plans.budgets]
        table.add(spread.name, f"{counts} of\u00a0{spread.num_neurons:,}", *cells)
    table.print()
    print()
    print_sentence(
        "predicted error: fraction of an FFN's output energy (the sum over its neurons) outside the heavy "
        "hitters; it ignores what refits, low-rank parts and later layers recover"
    )


def _lost(each: BudgetForecast) -> str:
    """What the budget allows, if rounding to multiples gave some of it up."""
    allowed = f"{each.keep_unrounded:.4g}"
    return "" if allowed == f"{each.keep:.4g}" else f" of {allowed}"


def _forecast(layer: LayerForecast) -> str:
    """Layout, number of heavy hitters (unless they are all neurons) and predicted error, one per line."""
    lines = [whole(layout(layer.layout)).replace(whole(" + "), " + "), percent(layer.energy_outside)]
    if len(layer.heavy_neurons) < layer.layout.num_neurons:
        lines.insert(1, f"{len(layer.heavy_neurons):,} heavy")
    return "\n".join(lines)


# What `ffsplit list` and `ffsplit gc` print.

COLUMNS = ("run", "committed", "kind", "model", "recipe", "keep", "size", "scores", "gates", "")


def _runs(store: Store) -> list[tuple[RunSummary, list[str]]]:
    """Every run, newest first, with its labels: `latest`, aliases, `pinned`. Raises ConfigError if none."""
    runs = list_runs(store)
    if not runs:
        names = store.list_directories("")
        models = [name for name in names if name != BATCHES_PREFIX and not name.startswith(".")]
        if models and BATCHES_PREFIX in names:
            raise ConfigError(
                f"{store.uri} is where a zoo publishes: list one of its models, such as "
                f"{store.uri}/{models[0]} ({INDEX_NAME} shows them all)"
            )
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
    """One row per run, newest first."""
    table = Table("", COLUMNS, left=COLUMNS, paths=("model",))
    for run, names in _runs(store):
        table.add(*_row(run, names))
    table.print()


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
    table = Table("", (verb, "why", "files", "size"), left=("why",))
    for each in done:
        table.add(each.prefix, each.reason, str(each.num_files), size(each.size_bytes))
    if done:
        table.print()
    if planned.num_leftovers:
        print(f"{verb} the leftovers of {planned.num_leftovers} broken uploads")
    total = size(sum(each.size_bytes for each in done))
    attempts = "1 attempt" if len(done) == 1 else f"{len(done)} attempts"
    kept = "1 run is kept" if len(planned.kept) == 1 else f"{len(planned.kept)} runs are kept"
    print(f"{verb} {attempts}, {total}; {kept}")
    if removed is None:
        print("dry run, nothing was removed: --delete removes it")


# The table of `ffsplit benchmark`.


def print_benchmark(record: BenchmarkRecord) -> None:
    """Both models at each shape, beside the largest speed-up that the removed work allows."""
    threads = "1 thread" if record.num_threads == 1 else f"{record.num_threads} threads"
    title = f"{record.device}, {record.dtype}, {threads}, timed alternately"
    table = Table(title, ("", "original", "compressed", "speed-up", "limit", "share"))
    for timing in record.timings:
        _add(table, timing)
    before, after = record.original, record.compressed
    loads = [milliseconds(1e3 * each.load_s) for each in (before, after)]
    table.add("load", *loads, times(before.load_s / after.load_s))
    if before.peak_memory_bytes is not None and after.peak_memory_bytes is not None:
        table.add("peak memory", size(before.peak_memory_bytes), size(after.peak_memory_bytes))
    table.print()
    if record.load is not None:
        print_sentence(load_in_words(record.load))
    if disturbed := described(_tails(record), record.load):
        print_sentence(f"warning: {disturbed}")


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
    table.add(
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
        table.add(f"  {name}", *map(milliseconds, figures), note)
    table.add("  tokens/s", number(first.tokens_per_s), number(second.tokens_per_s))
