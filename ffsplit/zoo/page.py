"""The page for a zoo's batches: every model of the newest batch, what changed, and the trend over batches."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from urllib.parse import quote

from markupsafe import Markup

from ffsplit.measurement.gates import verdict
from ffsplit.report import humanize
from ffsplit.report.html import Tile, page_template
from ffsplit.report.humanize import spread_in_words
from ffsplit.zoo.batch import (
    OUTCOMES,
    STATES,
    Batch,
    BatchModel,
    Difference,
    State,
    batch_key,
    headline,
    slowest,
)
from ffsplit.zoo.comparison import differences, short, what_changed

TEMPLATE_NAME, SCRIPT_NAME = "zoo.html", "zoo.js"
SPARK_WIDTH, SPARK_HEIGHT, SPARK_MARGIN = 120, 26, 3


@dataclass(frozen=True)
class Trend:
    """One model over the batches; None for a batch without it."""

    name: str
    states: tuple[State | None, ...]
    fidelity: tuple[float | None, ...]
    speedup: tuple[float | None, ...]
    size_bytes: tuple[float | None, ...]


@dataclass(frozen=True)
class Change:
    """What is new about one model: since its last result, and against what is in use."""

    model: BatchModel
    reasons: tuple[str, ...]
    before: BatchModel | None
    differences: tuple[Difference, ...]


def render_index(batches: Sequence[Batch]) -> str:
    """The page as HTML: the newest batch, which is the last one, and the trend over all batches."""
    newest, changes = batches[-1], _changes(batches)
    script = (Path(__file__).parent.parent / "report" / SCRIPT_NAME).read_text("utf-8")
    template = page_template(
        TEMPLATE_NAME,
        shown=_shown,
        difference=_difference,
        outcome=lambda outcome: OUTCOMES[outcome],
        short=short,
        spark=sparkline,
        headline=headline,
        slowest=slowest,
        last=_last,
        state=lambda state: STATES[state],
        verdict=verdict,
        moment=lambda text: datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return template.render(
        batch=newest,
        batches=list(reversed(batches)),
        tiles=_tiles(newest),
        trends=_trends(batches) if len(batches) > 1 else [],
        changes=changes,
        changed={change.model.name for change in changes},
        script=Markup(f"\n{script}"),
        script_digest=base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode(),
        has_costs=any(model.cost is not None for model in newest.models),
        wall_s=_wall_s,
        report_link=_report_link,
        batch_link=lambda batch: batch_key(batch.id),
        change=humanize.change,
        spread=spread_in_words,
        score_change=humanize.score_change,
    )


def sparkline(values: Sequence[float | None]) -> Markup:
    """A line over the batches, scaled to its own range, with a dot at its last value and a text label."""
    known = [(index, value) for index, value in enumerate(values) if value is not None]
    if not known:
        return Markup("&ndash;")
    low, high = min(value for _, value in known), max(value for _, value in known)
    step = (SPARK_WIDTH - 2 * SPARK_MARGIN) / max(1, len(values) - 1)
    rise = (SPARK_HEIGHT - 2 * SPARK_MARGIN) / (high - low) if high > low else 0.0

    def point(index: int, value: float) -> tuple[float, float]:
        y = SPARK_HEIGHT - SPARK_MARGIN - rise * (value - low) if rise else SPARK_HEIGHT / 2
        return round(SPARK_MARGIN + step * index, 1), round(y, 1)

    points = [point(index, value) for index, value in known]
    line = " ".join(f"{x},{y}" for x, y in points)
    x, y = points[-1]
    label = f"{humanize.number(known[0][1])} to {humanize.number(known[-1][1])} over {len(values)} batches"
    return Markup(
        f'<svg class="spark" viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" role="img" aria-label="{label}">'
        f'<title>{label}</title><polyline points="{line}"/><circle cx="{x}" cy="{y}" r="2.6"/></svg>'
    )


def _shown(value: float, unit: str) -> str:
    """A figure of a difference, in its unit."""
    shown = {"bytes": humanize.size, "times": humanize.times, "score": humanize.score}
    return shown.get(unit, humanize.number)(value)


def _difference(each: Difference) -> str:
    """The change of a figure: a share of sizes and speed-ups, else the difference itself."""
    if each.unit in ("bytes", "times"):
        return humanize.change(each.before, after=each.after)
    return humanize.score_change(each.before, after=each.after)


def _changes(batches: Sequence[Batch]) -> list[Change]:
    """The models with another run than before, or whose run was compared with the one in use."""
    earlier: dict[str, BatchModel] = {}
    for batch in batches[:-1]:
        earlier |= {model.name: model for model in batch.models if model.result is not None}
    found = []
    for model in batches[-1].models:
        before, result = earlier.get(model.name), model.result
        reasons: tuple[str, ...] = ()
        figures: tuple[Difference, ...] = ()
        if before is not None and before.result is not None and result is not None:
            reasons = what_changed(before.result, result)
            if reasons and before.result.figures is not None and result.figures is not None:
                figures = differences(before.result.figures, result.figures)
        compared = model.promotion is not None and bool(model.promotion.differences)
        if reasons or compared:
            found.append(Change(model, reasons, before if reasons else None, figures))
    return found


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _tiles(batch: Batch) -> list[Tile]:
    total = len(batch.models)
    new, before = batch.count("published"), batch.count("committed already")
    refused, failed = batch.count("refused"), batch.count("failed")
    standing = [
        model.result.figures
        for model in batch.models
        if model.state != "refused" and model.result is not None and model.result.figures is not None
    ]
    published = f"{new} in this batch, {before} earlier"
    tiles = [
        Tile("Published", f"{new + before} of {total}", published, is_warning=new + before < total),
        Tile("Refused by gates", str(refused), "not published, figures below", is_warning=refused > 0),
        Tile("Failed", str(failed), "errors below" if failed else "none", is_warning=failed > 0),
    ]
    if interrupted := batch.count("interrupted"):
        tiles.append(Tile("Interrupted", str(interrupted), "stopped before they finished", True))
    if standing:
        sizes = [figures.size_bytes for figures in standing]
        before_bytes, after_bytes = (sum(pair[index] for pair in sizes) for index in (0, 1))
        smaller = f"from {humanize.size(before_bytes)}, {humanize.change(before_bytes, after=after_bytes)}"
        tiles.append(Tile("Published size", humanize.size(after_bytes), smaller))
        speedups = [speedup for figures in standing if (speedup := slowest(figures)) is not None]
        if speedups:
            note = (
                "the median model, at the batch and length where it gains least; the models range from "
                f"{humanize.times(min(speedups))} to {humanize.times(max(speedups))}"
            )
            tiles.append(Tile("Speed-up", humanize.times(median(speedups)), note, min(speedups) < 1))
    if moved := batch.moved("promoted"):
        tiles.append(Tile("Now in use", str(moved), "promoted by this batch"))
    if batch.price is not None:
        tiles.append(Tile("Cost", humanize.number(batch.price), "by the zoo file's prices"))
    return tiles


def _trends(batches: Sequence[Batch]) -> list[Trend]:
    """One trend per model of the newest batch, in its order."""
    by_name = [{model.name: model for model in batch.models} for batch in batches]
    trends = []
    for model in batches[-1].models:
        found = [models.get(model.name) for models in by_name]
        figures = [each.result.figures if each is not None and each.result else None for each in found]
        trends.append(
            Trend(
                name=model.name,
                states=tuple(None if each is None else each.state for each in found),
                fidelity=tuple(None if each is None else headline(each) for each in figures),
                speedup=tuple(None if each is None else slowest(each) for each in figures),
                size_bytes=tuple(None if each is None else each.size_bytes[1] for each in figures),
            )
        )
    return trends


def _report_link(model: BatchModel) -> str | None:
    """The link from the page to a model's report."""
    return None if model.result is None else quote(f"{model.name}/{model.result.report}")


def _wall_s(batch: Batch) -> float:
    started, finished = (datetime.fromisoformat(text) for text in (batch.started_at, batch.finished_at))
    return (finished - started).total_seconds()
