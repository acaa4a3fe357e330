"""The report: one self-contained HTML page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ffsplit.measurement.gates import HEADLINES, verdict
from ffsplit.report import humanize
from ffsplit.report.card import loading_line
from ffsplit.report.humanize import (
    dropped_in_words,
    given_up_in_words,
    load_in_words,
    noise,
    spread_in_words,
    unchanged_in_words,
)
from ffsplit.report.plots import EnergyCurve, change_rows, energy_figure, error_columns, error_rows
from ffsplit.report.scales import SCALES, ScaleRow
from ffsplit.store.manifest import LayerRecord, Manifest, Measurements, TaskScore

# Templates of self-contained pages. They share one style and escape all text that users wrote.


def page_template(name: str, **filters: Callable[..., object]) -> Template:
    """A template of this package by file name, with filters that format numbers for people."""
    environment = Environment(
        loader=PackageLoader("ffsplit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=humanize.size,
        count=humanize.count,
        exact=lambda value: f"{value:,}",
        percent=humanize.percent,
        number=humanize.number,
        times=humanize.times,
        duration=humanize.duration,
        layout=humanize.layout,
        score=humanize.score,
        **filters,
    )
    return environment.get_template(name)


TEMPLATE_NAME: Final = "report.html"

_METRIC_NAMES: Final = {
    "token_cosine": "cosine of token states",
    "pooled_cosine": "cosine of mean-pooled states",
    "label_agreement": "label agreement",
    "logit_error": "relative squared error of logits",
    "kl_divergence": "KL divergence, nats per token",
    "top1_agreement": "top-1 agreement",
    "original_perplexity": "perplexity, original",
    "compressed_perplexity": "perplexity, compressed",
    "f1": "F1",
    "macro_f1": "macro F1",
}


_EXAMPLE_TASKS: Final = {
    "AutoModelForSequenceClassification": "classification:FILE.tsv",
    "AutoModelForCausalLM": "perplexity:FILE.txt",
}
"""By the class that loads the model; encoders are scored on pairs of sentences."""


@dataclass(frozen=True)
class Tile:
    """One headline number: its label, its value, and a note with figures to compare it with."""

    label: str
    value: str
    note: str
    is_warning: bool = False


def render_report(manifest: Manifest, *, curves: Sequence[EnergyCurve]) -> str:
    """The report of one run as HTML: the same bytes for the same manifest and curves.

    Sections without numbers (no measurements, no curves, no layers) are left out. All text that users
    wrote is escaped, and the page loads nothing.
    """
    template = page_template(TEMPLATE_NAME, metric=_metric_name, verdict=verdict)
    measured = manifest.measurements
    return template.render(
        manifest=manifest,
        measured=measured,
        loading="" if manifest.kind == "statistics" else loading_line(manifest, "."),
        scale_rows=[] if measured is None else _scale_rows(measured),
        meanings=[] if measured is None else _meanings(measured),
        example_task=_EXAMPLE_TASKS.get(manifest.model.loading_class, "sts:FILE.csv"),
        noise=None if measured is None else noise(measured.latency, measured.load),
        spread=spread_in_words,
        load=load_in_words,
        recipe_name=str(manifest.recipe.get("name", "")),
        unchanged=unchanged_in_words(
            manifest.model.left_out_ffns, ffn_elements=manifest.model.shape.ffn_elements
        ),
        given_up=given_up_in_words(manifest.keep, unrounded=manifest.keep_unrounded),
        tiles=_tiles(manifest),
        energy=energy_figure(curves) if curves else None,
        error_rows=error_rows(manifest.layers),
        error_columns=error_columns(manifest.layers),
        change_rows=change_rows(measured) if measured else [],
        layouts=_layouts(manifest.layers),
        unit=_unit(manifest.layers),
        tokens_differ=len({layer.num_tokens for layer in manifest.layers}) > 1,
        dropped="" if manifest.experts is None else dropped_in_words(manifest.experts),
        weighs_experts=any(layer.router_weighted_norm is not None for layer in manifest.layers),
        starved=[layer for layer in manifest.layers if layer.by_weight_norm],
        hardware=_hardware(manifest),
        total_s=sum(stage.wall_s for stage in manifest.stages),
        total_bytes=sum(file.size_bytes for file in manifest.files),
        recipe_json=_pretty(manifest.recipe),
        compute_json=_pretty({"seed": manifest.seed} | manifest.compute.model_dump(mode="json")),
        shape=humanize.shape,
        score_change=humanize.score_change,
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _metric_name(name: str) -> str:
    return _METRIC_NAMES.get(name, name.replace("_", " "))


def _scale_rows(measured: Measurements) -> list[ScaleRow]:
    """Each measure of fidelity on its scale. A perplexity has its change instead."""
    rows = []
    for name, value in measured.fidelity.items():
        scale, text = SCALES.get(name), humanize.number(value)
        before = measured.fidelity.get("original_perplexity")
        if name == "compressed_perplexity" and before is not None:
            text += f" ({humanize.change(before, after=value)})"
        if scale is None:
            rows.append(ScaleRow(_metric_name(name), text, None, 0.0, ("", "")))
        else:
            ticks = f"{scale.fair:g}", f"{scale.close:g}"
            rows.append(ScaleRow(_metric_name(name), text, scale.band(value), scale.place(value), ticks))
    return rows


def _meanings(measured: Measurements) -> list[str]:
    """What the scales say, once per scale."""
    scales = {SCALES[name]: name for name in reversed(measured.fidelity) if name in SCALES}
    named = {"pooled_cosine": "cosine", "token_cosine": "cosine", "kl_divergence": "KL divergence"}
    return [scale.meaning(named.get(name, _metric_name(name))) for scale, name in scales.items()]


def _tiles(manifest: Manifest) -> list[Tile]:
    if manifest.measurements is None:
        return _statistics_tiles(manifest)
    return _measured_tiles(manifest, manifest.measurements)


def _measured_tiles(manifest: Manifest, measured: Measurements) -> list[Tile]:
    before, after = measured.original_size, measured.compressed_size
    without = humanize.change(
        before.num_parameters_without_embeddings, after=after.num_parameters_without_embeddings
    )
    change = humanize.change(before.num_parameters, after=after.num_parameters)
    file_change = humanize.change(before.file_bytes, after=after.file_bytes)
    tiles = [
        Tile(
            "Size on disk",
            humanize.size(after.file_bytes),
            f"from {humanize.size(before.file_bytes)}, {file_change}",
        ),
        Tile(
            "Parameters",
            humanize.count(after.num_parameters),
            f"from {humanize.count(before.num_parameters)}, {change}; {without} without embeddings",
        ),
        _speed_tile(measured),
    ]
    if measured.fidelity:
        name = next((name for name in HEADLINES if name in measured.fidelity), next(iter(measured.fidelity)))
        disjoint = manifest.calibration.held_out_is_disjoint
        where = "held\u2011out text" if disjoint else "on calibration text"
        value = humanize.number(measured.fidelity[name])
        band = f"{SCALES[name].band(measured.fidelity[name])}: " if name in SCALES else ""
        note = f"{band}{_metric_name(name)}, {where}"
        tiles.append(Tile("Fidelity", value, note, is_warning=not disjoint))
    else:
        tiles.append(Tile("Fidelity", "\u2013", "not measured"))
    if len({task.spec for task in measured.tasks}) == 1:
        tiles.append(_task_tile(measured.tasks[0]))
    elif not measured.tasks:
        tiles.append(Tile("Tasks", "\u2013", "not scored on a task"))
    return tiles


def _task_tile(task: TaskScore) -> Tile:
    """The first metric of the only task."""
    change = humanize.score_change(task.original, after=task.compressed)
    note = f"{_metric_name(task.metric)}, from {humanize.score(task.original)}, {change}"
    if task.overlap_with_calibration:
        note += "; partly on calibration text"
    is_warning = task.overlap_with_calibration > 0
    return Tile(task.name, humanize.score(task.compressed), note, is_warning=is_warning)


def _speed_tile(measured: Measurements) -> Tile:
    if not measured.latency:
        return Tile("Speed-up", "\u2013", "not measured")
    main = max(measured.latency, key=lambda latency: latency.batch_size * latency.num_tokens)
    note = f"at {humanize.shape(main.batch_size, num_tokens=main.num_tokens)} tokens, {measured.device}"
    slowest = min(latency.speedup for latency in measured.latency)
    fastest = max(latency.speedup for latency in measured.latency)
    if len(measured.latency) > 1:
        note += f"; {humanize.times(slowest)} to {humanize.times(fastest)} over all shapes"
    if slowest < 1:
        note += "; slower than the original" if fastest < 1 else "; slower at some"
    if noise(measured.latency, measured.load):
        note += "; noisy"
    return Tile("Speed-up", humanize.times(main.speedup), note, is_warning=slowest < 1)


def _statistics_tiles(manifest: Manifest) -> list[Tile]:
    calibration, unit = manifest.calibration, _unit(manifest.layers)
    experts = len({layer.num_tokens for layer in manifest.layers}) > 1
    seen = "of calibration text" if experts else f"counted in each {unit}'s statistics"
    tiles = [
        Tile(f"{unit[0].upper()}{unit[1:]}s", humanize.count(len(manifest.layers)), "observed"),
        Tile("Tokens", humanize.count(calibration.num_tokens), seen),
        Tile("Rows of text", f"{calibration.num_rows:,}", f"{calibration.num_shards} shards"),
    ]
    shares = [share for layer in manifest.layers if (share := layer.energy_in_top_5_percent) is not None]
    if shares:
        note = f"at most, {humanize.percent(min(shares))} at least"
        tiles.append(Tile("Energy in the top 5\u00a0%", humanize.percent(max(shares)), note))
    return tiles if manifest.layers else tiles[1:]


def _unit(layers: Sequence[LayerRecord]) -> str:
    return humanize.unit((layer.name, layer.layer) for layer in layers)


def _layouts(layers: Sequence[LayerRecord]) -> str:
    """The layouts in one phrase, if there are few: `width 512 in every layer`."""
    unit = _unit(layers)
    counted = Counter(humanize.layout(layer.layout) for layer in layers)
    if len(counted) == 1:
        (only,) = counted
        return f"{only} in every {unit}" if len(layers) > 1 else only
    if 1 < len(counted) <= 3:
        return "; ".join(f"{layout} in {number} {unit}s" for layout, number in counted.items())
    return f"differs from {unit} to {unit}" if counted else ""


def _hardware(manifest: Manifest) -> dict[str, str]:
    """The host that measured; what is unknown of it, of the driver's."""
    facts, measured = {}, manifest.measurements
    known = manifest.environment.hardware | (measured.hardware if measured is not None else {})
    for name, value in known.items():
        is_size = isinstance(value, int) and name.endswith("_bytes")
        label = name.removesuffix("_bytes") if is_size else name
        facts[label.replace("_", " ")] = (
            humanize.size(value) if isinstance(value, int) and is_size else str(value)
        )
    return facts
