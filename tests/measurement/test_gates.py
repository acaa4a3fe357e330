"""Gates: how they are written, and what figure each is judged by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.errors import ConfigError
from ffsplit.measurement.fidelity import fidelity
from ffsplit.measurement.gates import (
    CLASSIFIER_FIDELITY,
    ENCODER_FIDELITY,
    LANGUAGE_FIDELITY,
    describe_result,
    judge,
    parse_gate,
    refusal,
    speed_limits,
    verdict,
)
from ffsplit.store.manifest import Latency, Measurements, Size, Spread, TaskScore
from tests.tiny_models import make_model, random_rows


def size(num_parameters: int, file_bytes: int) -> Size:
    blocks = num_parameters // 2
    return Size(
        num_parameters=num_parameters,
        num_parameters_without_embeddings=blocks,
        ffn_elements=blocks,
        ffn_bytes=4 * blocks,
        file_bytes=file_bytes,
    )


def latency(batch_size: int, speedup: float, *, interval: tuple[float, float] | None = None) -> Latency:
    fields: dict[str, Any] = dict.fromkeys(Latency.model_fields, 1.0)
    low, high = (speedup, speedup) if interval is None else interval
    fields |= {"spread": Spread(p10=low - 1, p90=high + 1, low=low, high=high)}
    return Latency.model_validate(
        fields | {"batch_size": batch_size, "num_tokens": 128, "num_pairs": 3, "speedup": speedup}
    )


def task(name: str, spec: str, metric: str, scores: tuple[float, float], better: bool | None) -> TaskScore:
    return TaskScore(
        name=name,
        spec=spec,
        metric=metric,
        higher_is_better=better,
        digest="d",
        original=scores[0],
        compressed=scores[1],
        num_examples=9,
        overlap_with_calibration=0,
    )


MEASURED = Measurements(
    original_size=size(1000, 4000),
    compressed_size=size(800, 3000),
    fidelity={"token_cosine": 0.97, "pooled_cosine": 0.985},
    latency=(latency(1, 1.4), latency(8, 1.6)),
    tasks=(
        task("sts dev.csv", "sts:data/dev.csv", "spearman", (86.7, 86.3), True),
        task("classification dev.tsv", "classification:dev.tsv#0,1", "accuracy", (92.0, 91.8), True),
        task("classification dev.tsv", "classification:dev.tsv#0,1", "f1", (91.0, 90.0), True),
        task("perplexity text.txt", "perplexity:text.txt", "perplexity", (20.0, 21.5), False),
        task("lm-eval arc_easy", "lm-eval:arc_easy,piqa", "acc", (0.5, 0.4), True),
        task("lm-eval piqa", "lm-eval:arc_easy,piqa", "bits", (0.5, 0.7), None),
    ),
    original_peak_memory_bytes=200,
    compressed_peak_memory_bytes=None,
    device="cpu",
    dtype="float32",
    num_threads=1,
)

FIGURES: list[tuple[str, float | None]] = [
    ("speedup >= 1.3", 1.4),
    ("speedup@8x128 >= 1.3", 1.6),
    ("speedup@8×128 >= 1.3", 1.6),  # noqa: RUF001
    ("speedup@2x64 >= 1.3", None),
    ("fidelity >= 0.98", 0.985),
    ("token_cosine >= .98", 0.97),
    ("top1_agreement >= 90%", None),
    ("sts drop <= 0.5", 0.4),
    ("dev.csv drop ≤ 0.4", 0.4),
    ("classification drop <= 0.5", 1.0),
    ("classification:accuracy drop <= 0.5", 0.2),
    ("classification:recall drop <= 0.5", None),
    ("perplexity drop <= 2", 1.5),
    ("arc_easy drop <= 0.2", 0.1),
    ("piqa drop <= 0.1", 0.2),
    ("lm-eval drop <= 0.3", 0.2),
    ("parameters reduction >= 20%", 0.2),
    ("blocks reduction >= 0.2", 0.2),
    ("size reduction >= 30 %", 0.25),
    ("memory reduction >= 1%", None),
]
NOT_MET = {
    "speedup@2x64 >= 1.3",
    "token_cosine >= .98",
    "top1_agreement >= 90%",
    "classification drop <= 0.5",
}
NOT_MET |= {"classification:recall drop <= 0.5", "piqa drop <= 0.1", "size reduction >= 30 %"}
NOT_MET |= {"memory reduction >= 1%"}


@pytest.mark.parametrize(("spec", "figure"), FIGURES)
def test_a_gate_is_judged_by_its_figure(spec: str, figure: float | None) -> None:
    gate = parse_gate(spec)
    assert parse_gate(str(gate)) == gate
    (result,) = judge([gate], MEASURED)
    assert result.figure == pytest.approx(figure)
    assert result.met == (spec not in NOT_MET)


def test_the_limit_itself_passes_and_what_is_not_finite_does_not() -> None:
    assert judge([parse_gate("speedup >= 1.4")], MEASURED)[0].met
    spoilt = MEASURED.model_construct(**{**dict(MEASURED), "fidelity": {"token_cosine": float("nan")}})
    (result,) = judge([parse_gate("token_cosine >= 0")], spoilt)
    assert (result.figure, result.met) == (None, False)


def test_a_refusal_names_the_gates_with_their_figures() -> None:
    results = judge([parse_gate(spec) for spec in ("speedup >= 2", "sts drop <= 0.5")], MEASURED)
    assert describe_result(results[1]) == "gate sts drop <= 0.5: 0.4, met"
    assert refusal(results) == (
        "1 of 2 gates not met, nothing was published: speedup >= 2: 1.4 (99 % interval 1.4 to 1.4), NOT met"
    )
    assert refusal(results[1:]) is None


NOISY = MEASURED.model_copy(
    update={"latency": (latency(1, 1.4, interval=(1.31, 1.52)), latency(8, 1.6, interval=(1.3, 1.8)))}
)
VERDICTS = {
    "speedup >= 1.3": "met",
    "speedup >= 1.301": "UNDECIDED",
    "speedup >= 1.4": "UNDECIDED",
    "speedup >= 1.52": "UNDECIDED",
    "speedup >= 1.53": "NOT met",
    "speedup@1x128 >= 1.31": "met",
    "speedup@1x128 >= 1.32": "UNDECIDED",
    "speedup@8x128 >= 1.8": "UNDECIDED",
    "speedup@8x128 >= 1.81": "NOT met",
    "speedup@9x128 >= 1": "NOT met",
    "size reduction >= 25%": "met",
}


@pytest.mark.parametrize("spec", VERDICTS)
def test_a_limit_within_the_noise_is_undecided(spec: str) -> None:
    (result,) = judge([parse_gate(spec)], NOISY)
    assert verdict(result) == VERDICTS[spec]
    assert (result.met, result.undecided) == (VERDICTS[spec] == "met", VERDICTS[spec] == "UNDECIDED")


def test_an_undecided_gate_refuses_in_its_own_words() -> None:
    results = judge([parse_gate(spec) for spec in ("speedup >= 1.4", "sts drop <= 0.3")], NOISY)
    assert describe_result(results[0]) == "gate speedup >= 1.4: 1.4 (99 % interval 1.3 to 1.52), UNDECIDED"
    assert refusal(results[:1]) == (
        "1 of 1 gates undecided, nothing was published: speedup >= 1.4: 1.4 (99 % interval 1.3 to 1.52), "
        "UNDECIDED: timing noise could decide this: run on a quieter machine, or with a larger "
        "measurement.latency_pairs in a copy of the recipe"
    )
    both = refusal(results)
    assert both is not None and both.startswith("1 of 2 gates not met, 1 of 2 gates undecided, nothing was")
    assert both.index("sts drop") < both.index("speedup")


def test_timings_without_an_interval_decide_nothing() -> None:
    few = Spread(p10=1, p90=9, low=None, high=None)
    for spread in (few, None):
        timed = latency(1, 5.0).model_copy(update={"spread": spread})
        (result,) = judge([parse_gate("speedup >= 2")], MEASURED.model_copy(update={"latency": (timed,)}))
        assert (result.figure, result.met, result.undecided) == (5.0, False, True)


def test_what_gates_ask_of_the_speed_is_told_to_whoever_times() -> None:
    gates = [parse_gate(spec) for spec in ("speedup >= 2", "fidelity >= 0.9", "speedup@8x16 >= 3")]
    assert speed_limits(gates) == ((None, 2), ((8, 16), 3))


BAD = {
    "": "the forms are",
    "speedup": "the forms are",
    "speedup > 1": "the forms are",
    "speedup@0x8 >= 1": "at least one row",
    "speedup >= 130%": "not measured in percent",
    "sts drop <= 0.5%": "not measured in percent",
    "sts drop >= 0.5": "write sts drop <= 0.5",
    "kl_divergence >= 0.1": "write kl_divergence <= 0.1",
    "fidelity >= nan": "'nan' is not a number",
    "fidelity >= 1e999": "is not a number",
    "drop <= 1": "'drop' is not measured",
    "bits reduction >= 0.1": "is not measured",
}


@pytest.mark.parametrize("spec", BAD)
def test_a_bad_gate_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="--gate") as caught:
        parse_gate(spec)
    assert BAD[spec] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "head", "makes", "known"),
    [
        ("bert", "", "states", ENCODER_FIDELITY),
        ("bert", "ForSequenceClassification", "states", CLASSIFIER_FIDELITY),
        ("llama", "ForCausalLM", "next_tokens", LANGUAGE_FIDELITY),
    ],
)
def test_fidelity_has_no_measure_that_a_gate_does_not_know(
    family: str, head: Any, makes: Any, known: dict[str, Any]
) -> None:
    batches = padded_batches(random_rows(2), batch_tokens=64, pad_id=0)
    with torch.no_grad():
        measured = fidelity(*[make_model(family, head=head) for _ in range(2)], batches, makes=makes)
    assert set(known) == set(measured) - {"original_perplexity"}
