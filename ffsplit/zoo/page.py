"""The page for a zoo's batches: every model of the newest batch, and its trend over earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from urllib.parse import quote

from markupsafe import Markup

from ffsplit.measurement.gates import verdict
from ffsplit.report import humanize
from ffsplit.report.html import Tile, page_template
from ffsplit.report.humanize import spread_in_words
from ffsplit.zoo.batch import STATES, Batch, BatchModel, State, batch_key, headline, slowest

TEMPLATE_NAME = "zoo.html"
SPARK_WIDTH, SPARK_HEIGHT, SPARK_MARGIN = 120, 26, 3


@dataclass(frozen=True)
class Trend:
    """One model over the batches; None for a batch without it."""

    name: str
    states: tuple[State | None, ...]
    fidelity: tuple[float | None, ...]
    speedup: tuple[float | None, ...]
    size_bytes: tuple[float | None, ...]


def render_index(batches: Sequence[Batch]) -> str:
    """The page as HTML: the newest batch, which is the last one, and the trend over all batches."""
    newest = batches[-1]
    template = page_template(
        TEMPLATE_NAME,
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
            note = f"median model; {humanize.times(min(speedups))} to {humanize.times(max(speedups))}"
            tiles.append(Tile("Lowest speed-up", humanize.times(median(speedups)), note, min(speedups) < 1))
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
