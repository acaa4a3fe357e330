"""The scales of fidelity say what the benchmarks measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffsplit.measurement.gates import FIDELITY
from ffsplit.report.scales import SCALES

RECORDS = Path(__file__).parents[2] / "benchmarks/quality.jsonl"
LANGUAGE = ("top1_agreement", "kl_divergence")


@pytest.mark.parametrize("name", SCALES)
def test_no_benchmark_lost_more_than_its_band_says(name: str) -> None:
    """The bound is the largest loss, rounded up: a looser one would say less than is known."""
    scale = SCALES[name]
    losses: dict[str, list[float]] = {"close": [], "fair": [], "far": []}
    for line in RECORDS.read_text().splitlines():
        record = json.loads(line)
        before, after, value = record["original"], record["score"], record["fidelity"].get(name)
        if value is None or (record["case"] in ("STS-B", "SST-2")) == (name in LANGUAGE):
            continue
        lost = 100 * (after / before - 1) if name in LANGUAGE else before - after
        losses[scale.band(value)].append(lost)
    close, fair = max(losses["close"]), max(losses["fair"])
    assert close <= scale.most[0] and max(close, fair) <= scale.most[1]
    assert max(losses["far"]) > scale.most[1]
    assert len(losses["close"]) >= 20


def test_a_place_is_a_third_per_band_and_ends_are_ends() -> None:
    scale = SCALES["pooled_cosine"]
    places = [scale.place(value) for value in (-1, 0.5, 0.7, 0.9, 0.925, 0.95, 1.0)]
    assert places == pytest.approx([0, 0, 100 / 6, 100 / 3, 50, 200 / 3, 100])
    falling = SCALES["kl_divergence"]
    assert [round(falling.place(value)) for value in (7, 1, 0.2, 0.05, 0)] == [0, 0, 33, 67, 100]
    assert [falling.band(value) for value in (0.21, 0.2, 0.05, 0)] == ["far", "fair", "close", "close"]


def test_every_measure_but_perplexities_has_a_scale() -> None:
    assert {name for name in FIDELITY if "perplexity" not in name} <= set(SCALES)
