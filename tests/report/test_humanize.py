from __future__ import annotations

import pytest

from ffsplit.ffn.shapes import FFNShape, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.report import humanize
from ffsplit.store.manifest import DroppedExperts, ExpertsRecord


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2212", "-").replace("\u00d7", "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2e-7, "0.000000200"),
        (0.0713, "0.0713"),
        (0.988, "0.988"),
        (0.99996, "0.9999"),
        (1, "1.00"),
        (-2.345, "-2.35"),
        (99.96, "100"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (-0.99999, "-0.9999"),
    ],
)
def test_number(value, text):
    assert plain(humanize.number(value)) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (1000, "1.00 kB"),
        (90_867_864, "90.9 MB"),
        (999_600, "1.00 MB"),
        (2e18, "2,000 PB"),
    ],
)
def test_size(num_bytes, text):
    assert plain(humanize.size(num_bytes)) == text


@pytest.mark.parametrize(("value", "text"), [(6, "6"), (999, "999"), (22_713_216, "22.7 M"), (1e9, "1.00 B")])
def test_count(value, text):
    assert plain(humanize.count(value)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.41, "410 ms"),
        (12.34, "12.3 s"),
        (59.7, "1 min 0 s"),
        (252, "4 min 12 s"),
        (11100, "3 h 5 min"),
    ],
)
def test_duration(seconds, text):
    assert plain(humanize.duration(seconds)) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (100, 60, "-40.0 %"),
        (100, 102, "+2.00 %"),
        (5, 5, "unchanged"),
        (0, 0, "unchanged"),
        (0, 3, "from nothing"),
    ],
)
def test_change(before, after, text):
    assert plain(humanize.change(before, after=after)) == text


def test_a_speed_up_just_below_one_is_not_rounded_up_in_silence():
    assert plain(humanize.times(0.934)) == "0.934x"
    assert plain(humanize.times(1.7234)) == "1.72x"
    assert plain(humanize.times(0.9961)) == "0.9961x"


@pytest.mark.parametrize(
    ("before", "after", "shown", "change"),
    [
        (86.72, 86.204, "86.20", "-0.52"),
        (86.72, 86.7205, "86.72", "0.00"),
        (97.95, 1234.5, "1,234.50", "+1,136.55"),
        (89.564, 85.206, "85.21", "-4.35"),
        (0.25, 0.2317, "0.2317", "-0.0183"),
        (-0.5, -12.0, "-12.00", "-11.50"),
    ],
)
def test_scores_and_their_change(before, after, shown, change):
    assert plain(humanize.score(after)) == shown
    assert plain(humanize.score_change(before, after=after)) == change


def test_layouts_in_words():
    dense, rest = PartLayout(num_neurons=77), LowRank(rank=64)
    factored = PartLayout(num_neurons=1459, up=rest, down=LowRank(rank=80))
    assert humanize.layout(LayerLayout(heavy=dense, light=None, down_bias=True)) == "width 77"
    both = LayerLayout(heavy=dense, light=factored, down_bias=True)
    assert humanize.layout(both) == "77 dense + 1,459 at rank 64 / rank 80"
    for integer, shown in (
        (Integer(num_bits=8), "int8"),
        (Integer(num_bits=4, group_size=32), "int4 in groups of 32"),
    ):
        quantized = PartLayout(num_neurons=1536, up=integer, gate=integer, down=integer)
        layer = LayerLayout(heavy=quantized, light=None, down_bias=False)
        assert humanize.layout(layer) == f"1,536 at {shown}"


def test_what_rounding_gave_up_is_one_line() -> None:
    shape = FFNShape(num_neurons=1536, hidden_size=384, gated=False, up_bias=True, down_bias=True)
    layouts, shapes = (LayerLayout.dense(shape, 512),) * 6, (shape,) * 6
    line = humanize.rounding_in_words(layouts, shapes, keep=0.3335, unrounded=0.3531)
    assert line == (
        "width 512 of 1,536 neurons: keep 0.3335; "
        "rounding widths gave up 0.0196 of the 0.3531 that the budget allows (--width-multiple 1 uses it)"
    )
    assert humanize.rounding_in_words(layouts, shapes, keep=0.3335, unrounded=0.3339) is None
    assert humanize.rounding_in_words(layouts, shapes, keep=0.3335, unrounded=0.3334) is None
    several = [LayerLayout.dense(shape, 64 * count) for count in (1, 2, 3, 4, 5)]
    line = humanize.rounding_in_words([*several, LayerLayout.dropped()], shapes, keep=0.1, unrounded=0.2)
    assert line is not None and line.startswith(
        "width 64 of 1,536, width 128 of 1,536, width 192 of 1,536 and 2 more"
    )
    assert humanize.given_up_in_words(None, unrounded=None) == ""


def test_ffns_are_layers_where_each_is_a_layers_only_one() -> None:
    assert humanize.unit([("layer 0", 0), ("layer 1", 1)]) == "layer"
    assert humanize.unit([("layer 0", 0), ("layer 1 expert 0", 1)]) == "FFN"
    assert humanize.unit([("encoder layer 0", 0), ("decoder layer 0", 1)]) == "FFN"


def test_dropped_experts_are_named_while_they_are_few() -> None:
    def dropped(num_blocks: int, num_dropped: int) -> ExpertsRecord:
        blocks = [
            DroppedExperts(block=f"layer {index}", experts=tuple(range(num_dropped)))
            for index in range(num_blocks)
        ]
        return ExpertsRecord(num_experts=64, num_kept=64 - num_dropped, dropped=tuple(blocks))

    few = "Experts left: 62 of 64 per block (layer 0 without 0, 1; layer 1 without 0, 1)."
    assert humanize.dropped_in_words(dropped(2, 2)) == few
    many = humanize.dropped_in_words(dropped(48, 16))
    assert (
        "layer 1 without" in many and "layer 2" not in many and many.endswith("lists all that were dropped).")
    )
    none = "Experts left: 24 of 64 per block (the manifest lists all that were dropped)."
    assert humanize.dropped_in_words(dropped(48, 40)) == none
