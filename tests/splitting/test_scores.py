"""Scores against their formulas on the raw activations, and the choice of heavy hitters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.errors import CalibrationError
from ffsplit.splitting.layer import HeavyRule
from ffsplit.splitting.scores import (
    FEWEST_TOKENS,
    centred_output_norm,
    energy_outside,
    energy_share,
    expected_output_norm,
    neurons_for_energy,
    num_energetic,
    output_energy,
    rms_output_norm,
    scores_of,
    top_neurons,
    well_sampled,
)

TOKENS, NEURONS, HIDDEN = 50, 40, 8
GENERATOR = np.random.default_rng(0)
ACTIVATION_TN = GENERATOR.normal(0.3, 1.0, (TOKENS, NEURONS)) * GENERATOR.lognormal(0, 2, NEURONS)
DOWN_DN = GENERATOR.normal(size=(HIDDEN, NEURONS))


def stats_of(activation_TN: np.ndarray, down_DN: np.ndarray) -> NeuronStats:
    return NeuronStats(
        num_tokens=len(activation_TN),
        sum_abs=np.abs(activation_TN).sum(0),
        sum=activation_TN.sum(0),
        sum_squares=(activation_TN**2).sum(0),
        max_abs=np.abs(activation_TN).max(0, initial=0.0),
        num_active=(activation_TN > 0).sum(0),
        down_norm=np.linalg.norm(down_DN, axis=0),
    )


STATS = stats_of(ACTIVATION_TN, DOWN_DN)
OUTPUT_TND = ACTIVATION_TN[:, :, None] * DOWN_DN.T
NORM_TN = np.linalg.norm(OUTPUT_TND, axis=-1)


def test_expected_output_norm_is_the_mean_norm_of_the_outputs() -> None:
    np.testing.assert_allclose(expected_output_norm(STATS), NORM_TN.mean(0), rtol=1e-12)


def test_rms_output_norm_is_the_root_mean_square_of_the_norms() -> None:
    np.testing.assert_allclose(rms_output_norm(STATS), np.sqrt((NORM_TN**2).mean(0)), rtol=1e-12)


def test_centred_output_norm_is_what_remains_without_the_mean_output() -> None:
    centred = OUTPUT_TND - OUTPUT_TND.mean(0)
    expected = np.sqrt((centred**2).sum(-1).mean(0))
    np.testing.assert_allclose(centred_output_norm(STATS), expected, rtol=1e-9)


def test_a_constant_neuron_has_no_centred_norm_however_it_is_rounded() -> None:
    stats = stats_of(np.full((7, 3), 0.1), DOWN_DN[:, :3])
    assert np.all(centred_output_norm(stats) < 1e-7)


def test_output_energy_is_the_mean_squared_norm() -> None:
    np.testing.assert_allclose(output_energy(STATS), (NORM_TN**2).mean(0), rtol=1e-12)


@pytest.mark.parametrize("score", [expected_output_norm, rms_output_norm, centred_output_norm, output_energy])
def test_no_token_no_score(score) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CalibrationError, match="no token"):
        score(stats_of(np.empty((0, 4)), DOWN_DN[:, :4]))


def test_an_expert_that_saw_too_few_tokens_is_judged_by_its_weights() -> None:
    starved, fed = (replace(STATS, num_tokens=n, expert=1) for n in (FEWEST_TOKENS - 1, FEWEST_TOKENS))
    np.testing.assert_array_equal(scores_of(starved, score="rms"), STATS.down_norm)
    np.testing.assert_array_equal(scores_of(fed, score="rms"), rms_output_norm(fed))
    few = replace(STATS, num_tokens=1)
    np.testing.assert_array_equal(scores_of(few, score="rms"), rms_output_norm(few))


def test_an_expert_that_saw_no_token_put_out_no_energy() -> None:
    unseen = replace(stats_of(np.empty((0, 4)), DOWN_DN[:, :4]), expert=2)
    assert output_energy(unseen).tolist() == [0.0] * 4
    assert energy_share(unseen, fraction=0.5) == 0.0


def test_starved_experts_have_no_say_in_what_their_block_keeps() -> None:
    fed, starved = (replace(STATS, num_tokens=n, expert=i) for i, n in enumerate((FEWEST_TOKENS, 3)))
    assert well_sampled([fed, starved], [0, 1]) == [0]
    assert well_sampled([starved, starved], [0, 1]) == [0, 1]
    flat = replace(starved, sum_squares=1 / STATS.down_norm**2)  # asks for nearly every neuron
    rule = HeavyRule(by="energy", value=0.9)
    alone = neurons_for_energy(fed, share=0.9)
    assert neurons_for_energy(flat, share=0.9) > alone
    assert num_energetic(rule, [fed, flat]) == (alone, alone)


def test_energy_share_of_the_top_fraction() -> None:
    energy = np.sort((NORM_TN**2).mean(0))[::-1]
    assert energy_share(STATS, fraction=0.05) == pytest.approx(energy[:2].sum() / energy.sum())
    assert energy_share(STATS, fraction=1.0) == pytest.approx(1.0)
    assert energy_share(stats_of(np.zeros((5, 4)), DOWN_DN[:, :4]), fraction=0.5) == 0.0


def test_of_equal_scores_the_lower_index_comes_first() -> None:
    scores = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert top_neurons(scores, count=4).tolist() == [1, 2, 3, 4]
    assert top_neurons(np.zeros(6), count=3).tolist() == [0, 1, 2]
    assert top_neurons(scores, count=0).tolist() == []
    assert top_neurons(scores, count=6).tolist() == list(range(6))


@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=40), data=st.data())
def test_top_neurons_are_ascending_and_none_left_out_is_higher(
    scores: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(scores)))
    chosen = top_neurons(np.array(scores, dtype=float), count=count).tolist()
    assert chosen == sorted(chosen) and len(set(chosen)) == count
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]
    assert chosen == sorted(expected)


@given(share=st.floats(0, 1))
def test_so_few_neurons_hold_the_share_and_one_fewer_does_not(share: float) -> None:
    energy = np.sort(output_energy(STATS))[::-1]
    count = neurons_for_energy(STATS, share=share)
    assert energy[:count].sum() >= share * energy.sum() * (1 - 1e-9)
    assert count == 1 or energy[: count - 1].sum() < share * energy.sum()


def test_neurons_for_energy_at_the_ends() -> None:
    equal = stats_of(np.ones((3, 10)), np.ones((1, 10)))
    assert [neurons_for_energy(equal, share=share) for share in (0, 0.5, 0.9, 1)] == [1, 5, 9, 10]
    assert neurons_for_energy(stats_of(np.zeros((5, 4)), DOWN_DN[:, :4]), share=0.9) == 1


def test_energy_outside_is_what_the_top_neurons_leave() -> None:
    top = top_neurons(output_energy(STATS), count=2)
    assert energy_outside(STATS, top) == pytest.approx(1 - energy_share(STATS, fraction=0.05))
    assert energy_outside(STATS, ()) == 1.0
    assert energy_outside(STATS, range(NEURONS)) == pytest.approx(0.0, abs=1e-12)
    assert energy_outside(stats_of(np.zeros((5, 4)), DOWN_DN[:, :4]), [0]) == 0.0
