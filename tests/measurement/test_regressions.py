"""Regression gates: how they are written, and how much worse than the current result each lets one be."""

from __future__ import annotations

import pytest

from ffsplit.errors import ConfigError
from ffsplit.measurement.gates import describe_result, parse_gate
from ffsplit.measurement.regressions import is_regression, judge_regressions, parse_regression
from ffsplit.store.manifest import Measurements
from tests.measurement.test_gates import latency, size, task


def measured(
    *, score: float = 86.0, cosine: float = 0.98, speedup: float = 2.0, file_bytes: int = 1000
) -> Measurements:
    return Measurements(
        original_size=size(1000, 4000),
        compressed_size=size(500, file_bytes),
        fidelity={"pooled_cosine": cosine, "kl_divergence": 1 - cosine},
        latency=(
            latency(1, speedup, interval=(speedup - 0.1, speedup + 0.1)),
            latency(8, 2 * speedup, interval=(2 * speedup - 0.1, 2 * speedup + 0.1)),
        ),
        tasks=(
            task("sts dev.csv", "sts:dev.csv", "spearman", (86.7, score), True),
            task("perplexity a.txt", "perplexity:a.txt", "perplexity", (10.0, 100 - score), False),
        ),
        original_peak_memory_bytes=None,
        compressed_peak_memory_bytes=None,
        device="cpu",
        dtype="float32",
        num_threads=1,
    )


@pytest.mark.parametrize(
    ("spec", "new", "figure", "met"),
    [
        ("sts drop <= 0.2 of current", measured(score=85.8), 0.2, True),
        ("sts drop <= 0.2 of current", measured(score=85.7), 0.3, False),
        ("sts:spearman drop <= 0.2 of current", measured(score=87), -1.0, True),
        ("perplexity drop <= 0.2 of current", measured(score=85.5), 0.5, False),
        ("fidelity drop <= 1% of current", measured(cosine=0.97), 0.01, True),
        ("fidelity drop <= 0.01 of current", measured(cosine=0.96), 0.02, False),
        ("kl_divergence drop <= 0.01 of current", measured(cosine=0.96), 0.02, False),
        ("size growth <= 5% of current", measured(file_bytes=1050), 0.05, True),
        ("size growth <= 5% of current", measured(file_bytes=1051), 0.051, False),
        ("accuracy drop <= 1 of current", measured(), None, False),
        ("label_agreement drop <= 1 of current", measured(), None, False),
    ],
)
def test_a_result_may_be_so_much_worse(spec: str, new: Measurements, figure: float | None, met: bool) -> None:
    (result,) = judge_regressions([parse_regression(spec)], new, measured())
    assert result.figure == (None if figure is None else pytest.approx(figure)) and result.met is met


def test_a_slower_result_is_judged_by_the_intervals() -> None:
    """Between 1 - 1.9 / 1.9 and 1 - 1.7 / 2.1 for a speed-up of 1.8 after 2, each by 0.1 uncertain."""
    gates = [parse_regression(f"speedup drop <= {limit} of current") for limit in ("20%", "10%", "0%")]
    kept, open_, _ = judge_regressions(gates, measured(speedup=1.8), measured())
    assert kept.met and kept.figure == pytest.approx(0.1) and kept.high == pytest.approx(1 - 1.7 / 2.1)
    assert open_.undecided and "UNDECIDED" in describe_result(open_)
    (failed,) = judge_regressions(gates[:1], measured(speedup=1.2), measured())
    assert not failed.met and not failed.undecided
    other = measured().model_copy(update={"latency": (latency(3, 2.0),)})
    (unmeasured,) = judge_regressions(gates[:1], other, measured())
    assert unmeasured.figure is None and not unmeasured.met


def test_scores_on_other_data_are_not_compared() -> None:
    current = measured()
    other = tuple(each.model_copy(update={"digest": "other"}) for each in current.tasks)
    gates = [parse_regression("sts drop <= 50 of current")]
    (result,) = judge_regressions(gates, measured(), current.model_copy(update={"tasks": other}))
    assert result.figure is None and not result.met


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sts <= 0.2 of current", "the forms are TASK drop <= F of current"),
        ("sts drop >= 0.2 of current", "the forms are"),
        ("sts drop <= x of current", "'x' is not a number of 0 or more"),
        ("sts drop <= -1 of current", "'-1' is not a number of 0 or more"),
        ("sts drop <= 2% of current", "a task's drop is in its own unit, not in percent"),
        ("sts growth <= 2 of current", "the forms are"),
    ],
)
def test_a_wrong_gate_is_one_line(spec: str, message: str) -> None:
    assert is_regression(spec)
    with pytest.raises(ConfigError, match=f"^gate {spec!r}: .*{message}"):
        parse_regression(spec)


def test_a_single_run_has_no_current_result() -> None:
    with pytest.raises(ConfigError, match="only a zoo file with `promote` compares with the current result"):
        parse_gate("sts drop <= 0.2  of current")


def test_speed_on_two_kinds_of_hardware_is_not_compared() -> None:
    """A result that is timed on another GPU is neither faster nor slower by that."""
    gate = parse_regression("speedup drop <= 20% of current")
    card, other = (
        measured().model_copy(update={"device": "cuda", "hardware": {"gpu": gpu, "processor": "p"}})
        for gpu in ("NVIDIA H100", "NVIDIA A10G")
    )
    (same,), (result,) = judge_regressions([gate], card, card), judge_regressions([gate], card, other)
    assert same.met and same.figure == 0
    assert (result.met, result.figure) == (False, None)
    on_cpus = [each.model_copy(update={"device": "cpu"}) for each in (card, other)]
    assert judge_regressions([gate], *on_cpus)[0].met, "their processor is the same"
