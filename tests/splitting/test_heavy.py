"""Heavy hitters by share of the budget, fraction of the neurons, or energy: never past the budget."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ffsplit.compressors import LowRankCompressor, PruneCompressor
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.splitting.layer import HeavyRule, fit_layer, smallest_keep, uniform_layouts

MINILM = FFNShape(num_neurons=1536, hidden_size=384, gated=False, up_bias=True, down_bias=True)
LOW_RANK, PRUNE = (LowRankCompressor(),), (PruneCompressor(),)
BUDGET = MINILM.num_elements // 3


def heavy_hitters(layout: LayerLayout | None) -> int:
    assert layout is not None
    return 0 if layout.heavy is None else layout.heavy.num_neurons


@pytest.mark.parametrize(("value", "width"), [(0.05, 72), (0.1, 144), (0.0, 0)])
def test_a_fraction_of_the_neurons(value: float, width: int) -> None:
    rule = HeavyRule(by="fraction", value=value)
    layout = fit_layer(MINILM, budget=BUDGET, heavy=rule, steps=LOW_RANK)
    assert heavy_hitters(layout) == width  # 76 and 153, rounded down by less than 2 % of the budget
    assert layout is not None and layout.num_neurons == 1536


@pytest.mark.parametrize(("count", "rounded"), [(1, 1), (30, 30), (200, 192)])
def test_as_many_as_hold_the_energy(count: int, rounded: int) -> None:
    rule = HeavyRule(by="energy", value=0.9)
    for multiple, width in ((1, count), (None, rounded), (64, max(64, count // 64 * 64))):
        layout = fit_layer(
            MINILM, budget=BUDGET, heavy=rule, steps=LOW_RANK, num_energetic=count, multiple=multiple
        )
        assert heavy_hitters(layout) == width


def test_each_layer_has_its_own_number_by_energy() -> None:
    rule = HeavyRule(by="energy", value=0.9)
    layouts = uniform_layouts([MINILM] * 3, keep=0.3, heavy=rule, steps=LOW_RANK, num_energetic=[3, 1, 90])
    assert [heavy_hitters(layout) for layout in layouts] == [3, 1, 88]  # 90 is rounded


@settings(deadline=None)
@given(count=st.integers(1, 1536), keep=st.floats(0.002, 0.99), steps=st.sampled_from([LOW_RANK, PRUNE]))
def test_a_budget_without_room_cuts_the_heavy_hitters_down(
    count: int, keep: float, steps: tuple[LowRankCompressor | PruneCompressor, ...]
) -> None:
    rule, budget = HeavyRule(by="energy", value=0.9), int(keep * MINILM.num_elements)

    def fitted(count: int, multiple: int | None) -> LayerLayout | None:
        return fit_layer(
            MINILM, budget=budget, heavy=rule, steps=steps, num_energetic=count, multiple=multiple
        )

    layout, rounded = fitted(count, 1), fitted(count, None)
    assume(layout is not None)
    assert layout is not None and layout.num_elements(MINILM) <= budget
    assert rounded is not None and rounded.num_elements(MINILM) <= budget
    width = heavy_hitters(layout)
    assert 0 <= width - heavy_hitters(rounded) < min(0.02 * 1536, max(width / 12, 1))
    if width < count:
        assert fitted(width + 1, 1) == layout


@pytest.mark.parametrize("by", ["share", "fraction", "energy"])
def test_a_rule_of_nothing_has_no_heavy_hitters(by: str) -> None:
    rule = HeavyRule(by=by, value=0)  # type: ignore[arg-type]
    assert heavy_hitters(fit_layer(MINILM, budget=BUDGET, heavy=rule, steps=LOW_RANK)) == 0


@pytest.mark.parametrize("by", ["fraction", "energy"])
def test_the_smallest_keep_is_one_heavy_hitter(by: str) -> None:
    rule = HeavyRule(by=by, value=0.5)  # type: ignore[arg-type]
    smallest = smallest_keep(MINILM, heavy=rule, steps=PRUNE)
    assert smallest == pytest.approx((384 + 769) / MINILM.num_elements, abs=1e-6)
