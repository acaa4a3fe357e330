from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ffsplit.errors import CalibrationError
from ffsplit.report.plots import NARROW, WIDE, change_figure, energy_curve, energy_figure, error_figure
from ffsplit.report.svg import depth_colors


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def test_a_curve_rises_from_nothing_to_everything():
    energy_N = np.random.default_rng(0).gamma(0.3, size=1000)
    curve = energy_curve(3, energy_N)
    assert curve.layer == 3 and len(curve.fractions) == len(curve.energy) <= 101
    assert curve.fractions[0] == curve.energy[0] == 0 and curve.fractions[-1] == curve.energy[-1] == 1
    assert all(np.diff(curve.fractions) > 0) and all(np.diff(curve.energy) >= 0)
    assert all(energy >= fraction for fraction, energy in zip(curve.fractions, curve.energy, strict=True))


def test_a_curve_holds_the_exact_share_at_its_points():
    energy_N = np.random.default_rng(1).gamma(0.3, size=500)
    curve = energy_curve(0, energy_N, num_points=30)
    largest_first_N = np.sort(energy_N)[::-1]
    for fraction, energy in zip(curve.fractions, curve.energy, strict=True):
        expected = largest_first_N[: round(fraction * 500)].sum() / energy_N.sum()
        assert energy == pytest.approx(expected, abs=1e-12)


def test_equal_neurons_give_the_diagonal_and_order_does_not_matter():
    flat = energy_curve(0, np.full(64, 2.0))
    assert flat.energy == pytest.approx(flat.fractions)
    assert flat.at(0.05) == pytest.approx(0.05)
    energy_N = np.arange(64.0)
    assert energy_curve(0, energy_N) == energy_curve(0, energy_N[::-1])


@pytest.mark.parametrize("num_neurons", [1, 2, 5])
def test_few_neurons(num_neurons):
    curve = energy_curve(0, np.ones(num_neurons))
    assert curve.fractions[-1] == curve.energy[-1] == 1
    assert len(curve.fractions) == num_neurons + 1
    energy_figure([curve], width=WIDE, name="few")


def test_a_dead_layer_lies_flat_and_can_be_drawn():
    curve = energy_curve(0, np.zeros(16))
    assert set(curve.energy) == {0.0}
    assert "0\u00a0%" in texts(energy_figure([curve], width=WIDE, name="dead"))


@pytest.mark.parametrize("energies", [[], [[1.0]], [1.0, -1.0], [1.0, float("nan")], [float("inf")]])
def test_energies_that_cannot_be_are_refused(energies):
    with pytest.raises(CalibrationError, match="layer 7"):
        energy_curve(7, np.array(energies))


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("num_layers", [1, 6, 24, 25, 80])
def test_figures_are_whole_titled_and_reproducible(make_manifest, make_curves, num_layers, width):
    manifest, curves = make_manifest(num_layers), make_curves(num_layers)
    for draw in (
        lambda: energy_figure(curves, width=width, name="a"),
        lambda: error_figure(manifest.layers, width=width, name="a"),
        lambda: change_figure(manifest.measurements, width=width, name="a"),
    ):
        svg = draw()
        root = ElementTree.fromstring(svg)
        assert root.get("viewBox", "").startswith(f"0 0 {width} ")
        assert root.get("role") == "img" and root.get("aria-labelledby") == "a-title a-desc"
        assert root[0].tag == "title" and root[0].text and root[1].tag == "desc" and root[1].text
        assert "#00000" not in svg and "http" not in svg and "<style" not in svg
        assert draw() == svg


def test_few_layers_are_all_named_in_the_order_of_their_lines(make_curves):
    named = [text for text in texts(energy_figure(make_curves(6), width=WIDE, name="a")) if "layer" in text]
    assert named == [f"layer {layer}" for layer in (0, 2, 1, 3, 4, 5)]


def test_the_legend_of_many_layers_is_thinned_and_keeps_both_ends(make_curves):
    written = texts(energy_figure(make_curves(80), width=WIDE, name="a"))
    named = [text for text in written if text.startswith("layer")]
    assert 5 <= len(named) <= 14 and named[0] == "layer 0" and named[-1] == "layer 79"
    assert any("of 80" in text for text in written)


def test_errors_stand_beside_their_layouts(make_manifest):
    written = texts(error_figure(make_manifest().layers, width=WIDE, name="a"))
    assert {"layer 0", "2.10\u00a0%", "width 512", "77 dense + 1,459 at rank 64"} <= set(written)


def test_a_lossless_run_has_bars_of_no_length(make_manifest):
    layers = [layer.model_copy(update={"relative_error": 0.0}) for layer in make_manifest().layers]
    assert texts(error_figure(layers, width=WIDE, name="a")).count("0\u00a0%") == len(layers)


def test_depth_colors_are_distinct_and_stand_out_from_white_and_from_black():
    for color in depth_colors(80):
        channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) > 3 and (luminance + 0.05) / (0.0103 + 0.05) > 3
    assert len(set(depth_colors(80))) == 80 and len(depth_colors(1)) == 1
