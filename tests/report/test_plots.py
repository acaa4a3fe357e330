from __future__ import annotations

import re
from importlib import resources

import numpy as np
import pytest

from ffsplit.errors import CalibrationError
from ffsplit.report.plots import (
    change_rows,
    depth_shades,
    energy_curve,
    energy_figure,
    error_columns,
    error_rows,
)


def test_a_curve_rises_from_nothing_to_everything():
    energy_N = np.random.default_rng(0).gamma(0.3, size=1000)
    curve = energy_curve(3, energy_N, name="layer 3")
    assert curve.layer == 3 and len(curve.fractions) == len(curve.energy) <= 101
    assert curve.fractions[0] == curve.energy[0] == 0 and curve.fractions[-1] == curve.energy[-1] == 1
    assert all(np.diff(curve.fractions) > 0) and all(np.diff(curve.energy) >= 0)
    assert all(energy >= fraction for fraction, energy in zip(curve.fractions, curve.energy, strict=True))


def test_a_curve_holds_the_exact_share_at_its_points():
    energy_N = np.random.default_rng(1).gamma(0.3, size=500)
    curve = energy_curve(0, energy_N, name="layer 0", num_points=30)
    largest_first_N = np.sort(energy_N)[::-1]
    for fraction, energy in zip(curve.fractions, curve.energy, strict=True):
        expected = largest_first_N[: round(fraction * 500)].sum() / energy_N.sum()
        assert energy == pytest.approx(expected, abs=1e-12)


def test_equal_neurons_give_the_diagonal_and_order_does_not_matter():
    flat = energy_curve(0, np.full(64, 2.0), name="layer 0")
    assert flat.energy == pytest.approx(flat.fractions)
    assert flat.at(0.05) == pytest.approx(0.05)
    energy_N = np.arange(64.0)
    assert energy_curve(0, energy_N, name="layer 0") == energy_curve(0, energy_N[::-1], name="layer 0")


@pytest.mark.parametrize("num_neurons", [1, 2, 5])
def test_few_neurons(num_neurons):
    curve = energy_curve(0, np.ones(num_neurons), name="layer 0")
    assert curve.fractions[-1] == curve.energy[-1] == 1
    assert len(curve.fractions) == num_neurons + 1
    energy_figure([curve])


def test_a_dead_layer_lies_flat_and_can_be_drawn():
    curve = energy_curve(0, np.zeros(16), name="layer 0")
    assert set(curve.energy) == {0.0}
    (line,) = energy_figure([curve]).lines
    assert line.value == "0\u00a0%" and {y for _, y in line.points} == {0.0}


@pytest.mark.parametrize("energies", [[], [[1.0]], [1.0, -1.0], [1.0, float("nan")], [float("inf")]])
def test_energies_that_cannot_be_are_refused(energies):
    with pytest.raises(CalibrationError, match="layer 7"):
        energy_curve(7, np.array(energies), name="layer 7")


@pytest.mark.parametrize("num_layers", [1, 6, 24, 25, 80])
def test_nothing_lies_outside_of_its_figure(make_manifest, make_curves, num_layers):
    manifest, energy = make_manifest(num_layers), energy_figure(make_curves(num_layers))
    columns, rows = error_columns(manifest.layers), error_rows(manifest.layers)
    places = [place for line in energy.lines for point in line.points for place in point]
    places += [tick.at for tick in (*energy.ticks, *energy.scale)] + [energy.mark]
    places += [bar.length for figure in columns for bar in figure.bars]
    places += [tick.at for figure in columns for tick in (*figure.scale, *figure.ticks)]
    places += [bar.length for row in rows + change_rows(manifest.measurements) for bar in row.bars]
    assert min(places) > -1e-9 and max(places) < 100 + 1e-9
    assert bool(rows) != bool(columns) and len(energy.lines) == num_layers


def test_a_line_ends_with_all_energy_and_passes_its_share(make_curves):
    figure = energy_figure(make_curves(6))
    for line, share in zip(figure.lines, (99, 96, 98, 89, 54, 24), strict=True):
        assert line.height == pytest.approx(share, abs=0.1) and line.points[-1] == (100, 100)
        assert line.points == tuple(sorted(line.points))
    assert {tick.text for tick in figure.ticks} >= {"1 %", "5 %", "100 %"}


def test_few_layers_are_all_listed_in_the_order_of_their_lines(make_curves):
    figure = energy_figure(make_curves(6))
    assert [line.label for line in figure.legend] == [f"layer {layer}" for layer in (0, 2, 1, 3, 4, 5)]
    assert figure.has_dots and "6 lines, one per layer" in figure.title


def test_the_legend_of_many_layers_is_thinned_and_keeps_both_ends(make_curves):
    figure = energy_figure(make_curves(80))
    named = [line.label for line in figure.legend]
    assert 5 <= len(named) <= 14 and named[0] == "layer 0" and named[-1] == "layer 79"
    assert not figure.has_dots


def test_errors_stand_beside_their_layouts(make_manifest):
    rows = error_rows(make_manifest().layers)
    first, third = rows[0], rows[2]
    assert (first.label, first.note, first.bars[0].text) == ("layer 0", "width 512", "2.10\u00a0%")
    assert third.note == "77 dense + 1,459 at rank 64"
    assert max(bar.length for row in rows for bar in row.bars) == 100


def test_many_errors_are_columns_with_a_scale(make_manifest):
    errors, elements = error_columns(make_manifest(80).layers)
    assert [tick.text for tick in errors.scale] == ["0", "10", "20"]
    assert errors.bars[79].length == 100 and errors.bars[79].text == "layer 79: 20.1"
    assert [tick.text for tick in elements.scale] == ["0", "0.2", "0.4"]
    assert [tick.text for tick in errors.ticks] == [str(layer) for layer in range(0, 80, 10)]


@pytest.mark.parametrize("num_layers", [6, 80])
def test_a_lossless_run_has_bars_of_no_length(make_manifest, num_layers):
    layers = [layer.model_copy(update={"relative_error": 0.0}) for layer in make_manifest(num_layers).layers]
    bars = [bar for row in error_rows(layers) for bar in row.bars]
    bars += [bar for figure in error_columns(layers)[:1] for bar in figure.bars]
    assert {bar.length for bar in bars} == {0} and len(bars) == num_layers


def test_a_quantity_is_shown_against_its_own_original(make_manifest):
    first = change_rows(make_manifest().measurements)[0]
    assert (first.label, first.note) == ("Parameters", "\u221220.8\u00a0%")
    assert [round(bar.length, 1) for bar in first.bars] == [100.0, 79.2]


def test_depth_is_one_colour_from_faint_to_strong():
    """Its ends stand out from the card, in light and in dark."""
    shades = depth_shades(80)
    assert shades == sorted(set(shades)) and len(shades) == 80 and depth_shades(1) == [0]
    assert (shades[0], shades[-1]) == (0, 100)
    css = resources.files("ffsplit.report").joinpath("page.css").read_text()
    named = [re.findall(rf"--{name}: (#\w+)", css) for name in ("card", "first", "last")]
    schemes = list(zip(*named, strict=True))
    assert len(schemes) == 2
    for card, first, last in schemes:
        assert 3 < contrast(card, first) < contrast(card, last) / 2


def test_errors_have_one_colour(make_manifest):
    """The number of a layer is its place in the figure, and needs no colour."""
    bars = [bar for row in error_rows(make_manifest().layers) for bar in row.bars]
    bars += [bar for figure in error_columns(make_manifest(80).layers) for bar in figure.bars]
    assert {bar.color for bar in bars} == {"var(--after)"}


def test_a_latency_stands_with_its_speed_up_and_spread(make_manifest):
    notes = {row.label: row.note for row in change_rows(make_manifest().measurements)}
    assert notes["p50, 8\u00a0\u00d7\u00a0128"] == "1.41\u00d7 (1.34 to 1.52\u00d7)"


def contrast(first: str, second: str) -> float:
    """Source: WCAG 2, of two colours as #rrggbb."""
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
