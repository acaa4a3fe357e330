"""The report's figures. Each is drawn twice, for a wide and for a narrow page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ffsplit.errors import CalibrationError
from ffsplit.report import humanize
from ffsplit.report.svg import AFTER, BEFORE, GRID, INK, MUTED, add_axes, add_canvas, depth_colors, render_svg
from ffsplit.store.manifest import LayerRecord, Measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Horizontal bars with their label, value and note written out: a figure that needs no axis.

_BAR_HEIGHT: Final = 13
_BAR_GAP: Final = 4
_ROW_GAP: Final = 15
_LABEL_WIDTH: Final = 132
_NOTE_WIDTH_PER_CHARACTER: Final = 7.2
_VALUE_WIDTH: Final = 74
_NARROWEST_WITH_COLUMNS: Final = 600


@dataclass(frozen=True)
class Bar:
    """One bar: its length, in one unit for the whole figure; what is written at its end; its colour."""

    value: float
    text: str
    color: str


@dataclass(frozen=True)
class BarRow:
    """One or more bars under one label, with a note."""

    label: str
    note: str
    bars: tuple[Bar, ...]


def bar_rows(rows: Sequence[BarRow], *, width: float, name: str, title: str, description: str) -> str:
    """Rows of bars as SVG. A narrow figure has label and note above the bars, a wide one at their sides."""
    assert rows
    wide = width >= _NARROWEST_WITH_COLUMNS
    heading = 0 if wide else 20
    heights = [heading + len(row.bars) * (_BAR_HEIGHT + _BAR_GAP) - _BAR_GAP for row in rows]
    longest = max(bar.value for row in rows for bar in row.bars) or 1
    label_width = max(len(row.label) for row in rows) * _NOTE_WIDTH_PER_CHARACTER + 16
    left = max(_LABEL_WIDTH, label_width) if wide else 0
    note_width = max(len(row.note) for row in rows) * _NOTE_WIDTH_PER_CHARACTER if wide else 0
    full = width - left - _VALUE_WIDTH - note_width

    def draw(figure: Figure) -> None:
        axes = add_canvas(figure)
        top = _ROW_GAP / 2
        for row, height in zip(rows, heights, strict=True):
            _draw_texts(axes, row, width=width, middle=top + (height / 2 if wide else 8))
            for index, bar in enumerate(row.bars):
                y = top + heading + index * (_BAR_HEIGHT + _BAR_GAP)
                _draw_bar(axes, bar, left=left, top=y, length=full * bar.value / longest)
            top += height + _ROW_GAP
            if wide and row is not rows[-1]:
                axes.plot([0, width], [top - _ROW_GAP / 2] * 2, color=GRID, lw=1)

    total = sum(heights) + _ROW_GAP * len(rows)
    return render_svg(draw, width=width, height=total, name=name, title=title, description=description)


def _draw_texts(axes: Axes, row: BarRow, *, width: float, middle: float) -> None:
    axes.text(0, middle, row.label, va="center", color=INK)
    axes.text(width - 2, middle, row.note, va="center", ha="right", color=MUTED)


def _draw_bar(axes: Axes, bar: Bar, *, left: float, top: float, length: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), max(length, 1.5), _BAR_HEIGHT, color=bar.color, lw=0))
    middle = top + _BAR_HEIGHT / 2
    axes.text(left + length + 8, middle, bar.text, va="center", color=INK)


WIDE: Final = 860
NARROW: Final = 360
HEAVY_SHARE: Final = 0.05
"""The share of neurons at which concentration is quoted."""

_MOST_LABELS: Final = 14
_MOST_ROWS: Final = 24


@dataclass(frozen=True)
class EnergyCurve:
    """How one layer's FFN output energy piles up over its neurons, those of most energy first.

    `fractions` (share of neurons) and `energy` (cumulative share of energy) both rise from 0 to 1.
    """

    layer: int
    fractions: tuple[float, ...]
    energy: tuple[float, ...]
    name: str = ""

    @property
    def label(self) -> str:
        return humanize.ffn(self.name, layer=self.layer)

    def at(self, fraction: float) -> float:
        """Share of energy in the top `fraction` of neurons."""
        return float(np.interp(fraction, self.fractions, self.energy))


def energy_curve(
    layer: int, energy_per_neuron: npt.NDArray[Any], *, num_points: int = 101, name: str = ""
) -> EnergyCurve:
    """The curve of one layer from its neurons' energies [N], at most `num_points` points.

    Points lie at 0 and at geometrically spaced counts of neurons, so that the first few heavy hitters
    show as well as the tail. A layer without any energy lies flat at 0. Raises CalibrationError when there
    are no energies, or some are negative or not finite.
    """
    energy_N = np.asarray(energy_per_neuron, dtype=np.float64)
    if energy_N.ndim != 1 or energy_N.size == 0:
        raise CalibrationError(f"layer {layer}: energies must be one number a neuron, not {energy_N.shape}")
    if not np.isfinite(energy_N).all() or energy_N.min() < 0:
        raise CalibrationError(f"layer {layer}: energies must be finite and not negative: collect them again")
    assert num_points >= 2
    cumulative_N = np.cumsum(np.sort(energy_N)[::-1])
    counts = np.unique(np.rint(np.geomspace(1, energy_N.size, num_points - 1)).astype(int))
    counts[-1] = energy_N.size
    share = np.minimum(cumulative_N[counts - 1] / (cumulative_N[-1] or 1.0), 1.0)
    fractions = counts / energy_N.size
    return EnergyCurve(layer, (0.0, *map(float, fractions)), (0.0, *map(float, share)), name)


def energy_figure(curves: Sequence[EnergyCurve], *, width: float, name: str) -> str:
    """Cumulative energy over the share of neurons, one line an FFN."""
    assert curves
    wide = width > 2 * NARROW
    ordered = sorted(curves, key=lambda curve: curve.layer)
    colors = dict(zip((curve.layer for curve in ordered), depth_colors(len(ordered)), strict=True))
    labelled = _labelled(ordered)
    longer = max(0, *(7 * (len(curve.label) - len("layer 00")) for curve in labelled))
    num_columns = 1 if wide or longer else 2
    legend_height = 0 if wide else 34 + 20 * -(-len(labelled) // num_columns)
    bottom = 340.0 if wide else 250.0

    def draw(figure: Figure) -> None:
        axes = add_axes(figure, left=52, right=width - (210 + longer if wide else 16), top=14, bottom=bottom)
        _energy_axes(axes, ordered, wide=wide)
        for curve in ordered:
            points = [(x, y) for x, y in zip(curve.fractions, curve.energy, strict=True) if x > 0]
            line_width = 2.0 if len(ordered) <= _MOST_LABELS else 1.1
            axes.plot(
                *zip(*points, strict=True), color=colors[curve.layer], lw=line_width, solid_capstyle="round"
            )
            if len(ordered) <= _MOST_LABELS:
                axes.plot([HEAVY_SHARE], [curve.at(HEAVY_SHARE)], "o", color=colors[curve.layer], ms=5)
        place = (width - 180 - longer, 24.0) if wide else (52.0, bottom + 62)
        _legend(
            figure,
            labelled,
            colors=colors,
            place=place,
            num_columns=num_columns,
            column_width=156 + longer,
            num_layers=len(ordered),
        )

    shares = [curve.at(HEAVY_SHARE) for curve in ordered]
    unit = humanize.unit((curve.name, curve.layer) for curve in ordered)
    spread = f"from {humanize.percent(min(shares))} to {humanize.percent(max(shares))}"
    return render_svg(
        draw,
        width=width,
        height=bottom + 44 + legend_height,
        name=name,
        title="Energy of the FFN output over the share of neurons",
        description=f"{len(ordered)} lines, one a {unit}. The top 5 % of neurons carry {spread} of it.",
    )


def _energy_axes(axes: Axes, curves: Sequence[EnergyCurve], *, wide: bool) -> None:
    lowest = min(x for curve in curves for x in curve.fractions if x > 0)
    start = min(max(lowest, 1e-4), HEAVY_SHARE / 5)
    axes.set_xscale("log")
    axes.set_xlim(start, 1)
    axes.set_ylim(0, 1.015)
    ticks = [tick for tick in (1e-4, 1e-3, 1e-2, HEAVY_SHARE, 1e-1, 0.25, 0.5, 1) if tick >= start]
    if not wide:
        ticks = [tick for tick in ticks if tick not in (1e-1, 0.25, 0.5)]
    axes.set_xticks(ticks, [f"{tick * 100:g} %" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.axvline(HEAVY_SHARE, color=MUTED, lw=1, ls=(0, (3, 3)), zorder=1)
    axes.set_xlabel("share of neurons, most energetic first (log scale)", labelpad=8)


def _labelled(ordered: Sequence[EnergyCurve]) -> list[EnergyCurve]:
    """The curves that the legend names: few, in the order of the lines; many, thinned, in depth order."""
    if len(ordered) <= _MOST_LABELS:
        return sorted(ordered, key=lambda curve: (-curve.at(HEAVY_SHARE), curve.layer))
    picks = np.unique(np.rint(np.linspace(0, len(ordered) - 1, _MOST_LABELS - 4)).astype(int))
    return [ordered[pick] for pick in picks]


def _legend(
    figure: Figure,
    labelled: Sequence[EnergyCurve],
    *,
    colors: dict[int, str],
    place: tuple[float, float],
    num_columns: int,
    column_width: int,
    num_layers: int,
) -> None:
    axes = add_canvas(figure)
    left, top = place
    heading = (
        "in the top 5 %"
        if len(labelled) == num_layers
        else f"in the top 5 %, {len(labelled)} of {num_layers}"
    )
    axes.text(left, top, heading, color=MUTED, va="center", fontsize=11)
    num_rows = -(-len(labelled) // num_columns)
    for index, curve in enumerate(labelled):
        column, row = divmod(index, num_rows)
        x, y = left + column * column_width, top + 22 + row * 20
        axes.plot([x, x + 16], [y, y], color=colors[curve.layer], lw=3, solid_capstyle="round")
        axes.text(x + 26, y, curve.label, va="center", color=INK)
        value = humanize.percent(curve.at(HEAVY_SHARE))
        axes.text(x + column_width - 20, y, value, va="center", ha="right", color=INK)


def error_figure(layers: Sequence[LayerRecord], *, width: float, name: str) -> str:
    """Each FFN's relative error with its layout; many of them as columns, with their elements below."""
    measured = [layer for layer in layers if layer.relative_error is not None]
    assert measured
    errors = [layer.relative_error or 0.0 for layer in measured]
    spread = f"from {humanize.percent(min(errors))} to {humanize.percent(max(errors))}"
    unit = humanize.unit((layer.name, layer.layer) for layer in measured)
    title = "Relative error of each FFN's output"
    description = f"{len(measured)} {unit}s, {spread}."
    colors = depth_colors(len(measured))
    if len(measured) <= _MOST_ROWS:
        rows = [
            BarRow(
                humanize.ffn(layer.name, layer=layer.layer),
                humanize.layout(layer.layout),
                (Bar(error, humanize.percent(error), color),),
            )
            for layer, error, color in zip(measured, errors, colors, strict=True)
        ]
        return bar_rows(rows, width=width, name=name, title=title, description=description)

    def draw(figure: Figure) -> None:
        numbers = [layer.layer for layer in measured]
        panels = (
            (24, 180, [100 * error for error in errors], "relative error, %"),
            (236, 336, [layer.num_elements / 1e6 for layer in measured], "elements stored, M"),
        )
        for top, bottom, heights, label in panels:
            axes = add_axes(figure, left=44, right=width - 8, top=top, bottom=bottom)
            axes.bar(numbers, heights, width=0.72, color=colors)
            axes.set_xlim(numbers[0] - 0.8, numbers[-1] + 0.8)
            axes.locator_params(axis="y", nbins=4)
            axes.locator_params(axis="x", nbins=16 if width > 2 * NARROW else 8, integer=True)
            axes.grid(axis="y")
            axes.spines["left"].set_visible(False)
            axes.set_title(label, loc="left", fontsize=12, color=MUTED, pad=8)
        axes.set_xlabel(unit, labelpad=6)

    return render_svg(draw, width=width, height=388, name=name, title=title, description=description)


def change_figure(measurements: Measurements, *, width: float, name: str) -> str:
    """Before and after, each quantity against its own original."""
    before, after = measurements.original_size, measurements.compressed_size
    rows = [
        _pair("Parameters", before.num_parameters, after.num_parameters, humanize.count),
        _pair("FFN bytes", before.ffn_bytes, after.ffn_bytes, humanize.size),
        _pair("File bytes", before.file_bytes, after.file_bytes, humanize.size),
    ]
    for latency in measurements.latency:
        label = "p50, " + humanize.shape(latency.batch_size, num_tokens=latency.num_tokens)
        rows.append(_pair(label, latency.original_p50_ms, latency.compressed_p50_ms, humanize.milliseconds))
    memory = measurements.original_peak_memory_bytes, measurements.compressed_peak_memory_bytes
    if memory[0] is not None and memory[1] is not None:
        rows.append(_pair("Peak memory", memory[0], memory[1], humanize.size))
    changes = "; ".join(f"{row.label} {row.note}" for row in rows)
    return bar_rows(rows, width=width, name=name, title="Before and after", description=changes)


def _pair(label: str, before: float, after: float, text: Any) -> BarRow:
    scale = max(before, after) or 1
    bars = Bar(before / scale, text(before), BEFORE), Bar(after / scale, text(after), AFTER)
    return BarRow(label, humanize.change(before, after=after), bars)
