"""The report's figures as numbers and text. `figures.html` draws them.

Lengths and positions are percentages of the figure, from its left and bottom edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ffsplit.errors import CalibrationError
from ffsplit.report import humanize
from ffsplit.store.manifest import LayerRecord, Measurements

HEAVY_SHARE: Final = 0.05
"""The share of neurons at which the energy is reported."""

_MOST_LABELS: Final = 14
_MOST_ROWS: Final = 24


def depth_shades(num_layers: int) -> list[float]:
    """One shade of one colour per layer, from 0 (the first, faint) to 100 (the last, strong)."""
    return [100 * layer / max(1, num_layers - 1) for layer in range(num_layers)]


@dataclass(frozen=True)
class EnergyCurve:
    """The cumulative output energy of one layer's FFN over its neurons, the most energetic first.

    `fractions` (share of neurons) and `energy` (cumulative share of energy) both rise from 0 to 1.
    """

    layer: int
    fractions: tuple[float, ...]
    energy: tuple[float, ...]
    name: str

    def at(self, fraction: float) -> float:
        """Share of energy in the top `fraction` of neurons."""
        return float(np.interp(fraction, self.fractions, self.energy))


def energy_curve(
    layer: int, energy_per_neuron: npt.NDArray[Any], *, name: str, num_points: int = 101
) -> EnergyCurve:
    """The curve of one layer from its neurons' energies [N], at most `num_points` points.

    Points lie at 0 and at geometrically spaced counts of neurons, so that both the first heavy hitters
    and the tail are visible. A layer without energy is flat at 0. Raises CalibrationError if there are no
    energies, or some are negative or not finite.
    """
    energy_N = np.asarray(energy_per_neuron, dtype=np.float64)
    if energy_N.ndim != 1 or energy_N.size == 0:
        raise CalibrationError(f"layer {layer}: energies must be one number per neuron, not {energy_N.shape}")
    if not np.isfinite(energy_N).all() or energy_N.min() < 0:
        raise CalibrationError(f"layer {layer}: energies must be finite and not negative: collect them again")
    assert num_points >= 2
    cumulative_N = np.cumsum(np.sort(energy_N)[::-1])
    counts = np.unique(np.rint(np.geomspace(1, energy_N.size, num_points - 1)).astype(int))
    counts[-1] = energy_N.size
    share = np.minimum(cumulative_N[counts - 1] / (cumulative_N[-1] or 1.0), 1.0)
    fractions = counts / energy_N.size
    return EnergyCurve(layer, (0.0, *map(float, fractions)), (0.0, *map(float, share)), name)


class Tick(NamedTuple):
    """A position on an axis and its label. Narrow pages hide the `detail` ones."""

    at: float
    text: str
    detail: bool = False


class Line(NamedTuple):
    """One FFN's curve: its points, its height at `HEAVY_SHARE`, its entry in the legend."""

    points: tuple[tuple[float, float], ...]
    height: float
    shade: float
    label: str
    value: str


class Lines(NamedTuple):
    """Lines in depth order, and those that the legend lists."""

    title: str
    lines: tuple[Line, ...]
    legend: tuple[Line, ...]
    scale: tuple[Tick, ...]
    ticks: tuple[Tick, ...]
    mark: float

    @property
    def has_dots(self) -> bool:
        return len(self.lines) <= _MOST_LABELS


class Bar(NamedTuple):
    """One bar: length, text at its end, colour."""

    length: float
    text: str
    color: str


class BarRow(NamedTuple):
    """One or more bars under one label, with a note."""

    label: str
    note: str
    bars: tuple[Bar, ...]


class Columns(NamedTuple):
    """One column per FFN in depth order. `scale` has the labelled heights, `ticks` the labelled FFNs."""

    title: str
    bars: tuple[Bar, ...]
    scale: tuple[Tick, ...]
    ticks: tuple[Tick, ...]


def energy_figure(curves: Sequence[EnergyCurve]) -> Lines:
    """Cumulative energy over the share of neurons on a log scale, one line per FFN."""
    assert curves
    ordered = sorted(curves, key=lambda curve: curve.layer)
    lowest = min(fraction for curve in ordered for fraction in curve.fractions if fraction > 0)
    start = min(max(lowest, 1e-4), HEAVY_SHARE / 5)

    def across(fraction: float) -> float:
        return 100 - 100 * math.log(fraction) / math.log(start)

    lines = tuple(
        Line(
            points=tuple(
                (across(fraction), 100 * curve.at(fraction))
                for fraction in sorted({max(each, start) for each in curve.fractions if each > 0})
            ),
            height=100 * curve.at(HEAVY_SHARE),
            shade=shade,
            label=curve.name,
            value=humanize.percent(curve.at(HEAVY_SHARE)),
        )
        for curve, shade in zip(ordered, depth_shades(len(ordered)), strict=True)
    )
    shares = [curve.at(HEAVY_SHARE) for curve in ordered]
    unit = humanize.unit((curve.name, curve.layer) for curve in ordered)
    spread = f"from {humanize.percent(min(shares))} to {humanize.percent(max(shares))}"
    return Lines(
        title="Energy of the FFN output over the share of neurons. "
        f"{len(lines)} lines, one per {unit}. The top 5 % of neurons carry {spread} of it.",
        lines=lines,
        legend=_listed(lines),
        scale=tuple(Tick(height, f"{height} %" if height else "0") for height in range(0, 101, 25)),
        ticks=tuple(
            Tick(across(share), f"{share * 100:g} %", detail=share in (0.1, 0.25, 0.5))
            for share in (1e-4, 1e-3, 1e-2, HEAVY_SHARE, 0.1, 0.25, 0.5, 1)
            if share >= start
        ),
        mark=across(HEAVY_SHARE),
    )


def _listed(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lines in the legend: all by height if they are few, otherwise a selection in depth order."""
    if len(lines) <= _MOST_LABELS:
        return tuple(sorted(lines, key=lambda line: -line.height))
    picks = np.unique(np.rint(np.linspace(0, len(lines) - 1, _MOST_LABELS - 4)).astype(int))
    return tuple(lines[pick] for pick in picks)


def error_rows(layers: Sequence[LayerRecord]) -> list[BarRow]:
    """Each FFN's relative error with its layout; empty for many FFNs, which `error_columns` draws."""
    errors = _errors(layers)
    if len(errors) > _MOST_ROWS:
        return []
    largest = max((error for _, error in errors), default=0) or 1
    return [
        BarRow(
            layer.name,
            humanize.layout(layer.layout),
            (Bar(100 * error / largest, humanize.percent(error), "var(--after)"),),
        )
        for layer, error in errors
    ]


def error_columns(layers: Sequence[LayerRecord]) -> list[Columns]:
    """Each FFN's relative error and stored elements; empty if `error_rows` draws them."""
    errors = _errors(layers)
    if len(errors) <= _MOST_ROWS:
        return []
    measured = [layer for layer, _ in errors]
    return [
        _columns(measured, [100 * error for _, error in errors], "relative error in %"),
        _columns(measured, [layer.num_elements / 1e6 for layer in measured], "millions of elements stored"),
    ]


def _errors(layers: Sequence[LayerRecord]) -> list[tuple[LayerRecord, float]]:
    return [(layer, layer.relative_error) for layer in layers if layer.relative_error is not None]


def _columns(layers: Sequence[LayerRecord], heights: Sequence[float], title: str) -> Columns:
    largest = max(heights) or 1
    power = 10 ** math.floor(math.log10(largest / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if 4 * factor * power >= largest)
    every = -(-len(layers) // 8)
    return Columns(
        title,
        tuple(
            Bar(100 * height / largest, f"{layer.name}: {height:.3g}", "var(--after)")
            for layer, height in zip(layers, heights, strict=True)
        ),
        tuple(Tick(100 * step * n / largest, f"{step * n:g}") for n in range(int(largest / step) + 1)),
        tuple(
            Tick(100 * (index + 0.5) / len(layers), str(layers[index].layer), detail=index // every % 2 == 1)
            for index in range(0, len(layers), every)
        ),
    )


def change_rows(measurements: Measurements) -> list[BarRow]:
    """Each quantity before and after, on its own scale."""
    before, after = measurements.original_size, measurements.compressed_size
    rows = [
        _pair("Parameters", before.num_parameters, after.num_parameters, humanize.count),
        _pair("FFN bytes", before.ffn_bytes, after.ffn_bytes, humanize.size),
        _pair("File bytes", before.file_bytes, after.file_bytes, humanize.size),
    ]
    for latency in measurements.latency:
        label = "p50, " + humanize.shape(latency.batch_size, num_tokens=latency.num_tokens)
        pair = _pair(label, latency.original_p50_ms, latency.compressed_p50_ms, humanize.milliseconds)
        spread = humanize.spread_in_words(latency.spread)
        speedup = humanize.times(latency.speedup)
        rows.append(pair._replace(note=f"{speedup} ({spread})" if spread else speedup))
    memory = measurements.original_peak_memory_bytes, measurements.compressed_peak_memory_bytes
    if memory[0] is not None and memory[1] is not None:
        rows.append(_pair("Peak memory", memory[0], memory[1], humanize.size))
    return rows


def _pair(label: str, before: float, after: float, text: Any) -> BarRow:
    scale = (max(before, after) or 1) / 100
    bars = Bar(before / scale, text(before), "var(--before)"), Bar(after / scale, text(after), "var(--after)")
    return BarRow(label, humanize.change(before, after=after), bars)
