"""Healing on tiny models: it learns, it never makes a model worse, and it goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from ffsplit.calibration.model_inputs import Batch
from ffsplit.ffn.quantization import fake_quantize
from ffsplit.healing import losses
from ffsplit.healing.gradient import Distillation
from ffsplit.healing.loop import (
    HealingState,
    Pace,
    fake_quantized,
    fresh_accelerator,
    heal,
    peak_rate,
    settle,
    trainable_weights,
)
from ffsplit.healing.losses import Distance
from ffsplit.healing.rows import HealingData, num_epochs, rows_a_step
from ffsplit.healing.settings import HealingSettings
from ffsplit.healing.team import Alone
from tests.tiny_models import make_model, random_rows

KINDS: list[tuple[str, str, Any]] = [("bert", "", "states"), ("llama", "ForCausalLM", "next_tokens")]


def disturbed(family: str, head: str, *, noise: float = 0.05) -> Any:
    """A model near `make_model(family)`, as a compressed one is."""
    model = make_model(family, head=head)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_weights(model).items():
            if {"pooler", "classifier", "score"} & {*name.split(".")}:
                continue  # a classifier's head is as it was
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def data() -> HealingData:
    rows = random_rows(64, seed=1)
    return HealingData(rows[:48], rows[48:], pad_id=0, batch_tokens=512)


def settled(**options: Any) -> HealingSettings:
    """Settings for a CPU."""
    return HealingSettings(**options).settled(large_steps=False, in_bfloat16=False)


def run(student: Any, teacher: Any, makes: Any, **options: Any) -> HealingState:
    settings = settled(**({"epochs": 2, "batch_rows": 8, "learning_rate": 3e-3} | options))
    return heal(
        student,
        teacher,
        data(),
        makes=makes,
        settings=settings,
        seed=0,
        resume=lambda weights, optimizer: None,
        checkpoint=lambda state, weights, optimizer: None,
    )


@pytest.mark.parametrize(("family", "head", "makes"), KINDS)
def test_the_student_comes_closer(family: str, head: str, makes: Any) -> None:
    teacher, student = make_model(family, head=head), disturbed(family, head)
    state = run(student, teacher, makes)
    assert state.best_loss < 0.8 * state.first_loss
    batches = validation_batches()
    distance = Distance.of(student, teacher, batches[0], makes=makes)
    assert distance.mean(batches) == pytest.approx(state.best_loss, rel=1e-5)


def test_what_is_near_its_original_already_is_healed_at_a_lower_rate() -> None:
    settings = settled(learning_rate=4e-4)
    rates = [peak_rate(settings, loss, makes="states") for loss in (0.3, 0.15, 0.075, 0.0)]
    assert rates == [8e-4, 8e-4, pytest.approx(2e-4), 0.0]
    assert peak_rate(settings, 0.01, makes="next_tokens") == 4e-4
    assert peak_rate(settings, 0.01, makes="states", far=0.02) == pytest.approx(2e-4)


def test_larger_steps_have_higher_rates() -> None:
    on_gpu = HealingSettings(learning_rate=4e-4).settled(large_steps=True, in_bfloat16=True)
    assert (on_gpu.step_tokens, on_gpu.mixed_precision) == (24_576, "bf16")
    assert peak_rate(on_gpu, 0.01, makes="next_tokens") == pytest.approx(4e-4 * 12**0.5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_is_judged_by_its_logits(family: str) -> None:
    """Its states may come closer while what it gives goes away: it is not healed by that."""
    head = "ForSequenceClassification"
    teacher, student = make_model(family, head=head), disturbed(family, head)
    batches = validation_batches()

    def error() -> float:
        with torch.no_grad():
            s_RL, t_RL = (
                torch.cat([model(**batch.arguments).logits.double() for batch in batches])
                for model in (student, teacher)
            )
        s_RL, t_RL = (logits - logits.mean(1, keepdim=True) for logits in (s_RL, t_RL))
        return float((s_RL - t_RL).square().sum() / t_RL.square().sum())

    before = error()
    state = run(student, teacher, "states", epochs=10, learning_rate=2e-3)
    assert state.first_loss == pytest.approx(before) and state.best_loss == pytest.approx(error())
    assert state.best_loss < 0.8 * state.first_loss


@pytest.mark.parametrize(("family", "head", "makes"), KINDS)
def test_mixed_precision_learns_as_well(family: str, head: str, makes: Any) -> None:
    teacher = make_model(family, head=head)
    full, mixed = (
        run(disturbed(family, head), teacher, makes, epochs=1, mixed_precision=precision)
        for precision in ("no", "bf16")
    )
    assert mixed.first_loss == full.first_loss, "judged in full precision"
    assert mixed.best_loss != full.best_loss
    assert mixed.best_loss == pytest.approx(full.best_loss, rel=0.1)


def validation_batches() -> list[Batch]:
    return list(data().validation_batches())


def gradients_of(student: Any, teacher: Any, makes: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step on a few rows of many lengths."""
    rows, weights = data().rows[:12], trainable_weights(student)
    distance = Distance.of(student, teacher, validation_batches()[0], makes=makes)
    distillation = Distillation(replace(distance, **options.pop("distance", {})), weights, Alone(), **options)
    distillation.set_gradient(rows, pad_id=0, accelerator=fresh_accelerator(settled(), torch.device("cpu")))
    return {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.parametrize(("family", "head", "makes"), KINDS)
def test_a_step_in_several_passes_has_the_same_gradient(family: str, head: str, makes: Any) -> None:
    teacher, student = make_model(family, head=head), disturbed(family, head)
    whole, parts = (gradients_of(student, teacher, makes, pass_tokens=tokens) for tokens in (None, 48))
    assert set(whole) == set(parts) and any(gradient.abs().max() > 1e-4 for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)


def test_logits_in_chunks_have_the_gradient_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the head, which is not tied to the embeddings here."""
    teacher, student = make_model("llama", head="ForCausalLM"), disturbed("llama", "ForCausalLM")
    whole = gradients_of(student, teacher, "next_tokens", distance={"has_heads": False})
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 7 * student.config.vocab_size)
    chunks = gradients_of(student, teacher, "next_tokens", distance={"has_heads": True})
    assert set(whole) == set(chunks) and float(whole["lm_head.weight"].abs().max()) > 1e-5
    for name, gradient in whole.items():
        torch.testing.assert_close(chunks[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_model_that_changes_its_logits_is_compared_by_them() -> None:
    """Gemma 2 caps its logits: those of its head alone are others."""
    batch = validation_batches()[0]
    plain = make_model("llama", head="ForCausalLM")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": plain.config.vocab_size}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.05)).eval()
    assert Distance.of(plain, plain, batch, makes="next_tokens").has_heads
    assert not Distance.of(capped, capped, batch, makes="next_tokens").has_heads


def test_without_a_validation_row_the_model_stays_as_it_was() -> None:
    """Held-out rows may hold nothing but special tokens: then nothing tells whether a step was better."""
    some = data()
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    state = heal(
        disturbed("llama", "ForCausalLM"),
        make_model("llama", head="ForCausalLM"),
        HealingData(some.rows, [], pad_id=0, batch_tokens=512),
        makes="next_tokens",
        settings=settled(epochs=1, batch_rows=8),
        seed=0,
        resume=nothing,
        checkpoint=nothing,
    )
    assert state.step > 0 and state.best_step == 0


def test_checkpoints_are_due_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ffsplit.healing.loop.time.monotonic", lambda: now)
    pace, due = Pace(100, 2), []
    for each in (60.0, 119.0, 120.0, 180.0, 239.0, 250.0, 369.0, 371.0):
        now = each
        due.append(pace.is_checkpoint_due())
    assert due == [False, False, True, False, False, True, False, True]
    assert all(Pace(100, 0).is_checkpoint_due() for _ in range(3))


def test_checkpoints_that_take_long_are_written_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ffsplit.healing.loop.time.monotonic", lambda: now)
    pace, always = Pace(100, 2), Pace(100, 0)
    now = 120.0
    assert pace.is_checkpoint_due() and always.is_checkpoint_due()
    now = 150.0  # 30 s later it is written
    pace.wrote_checkpoint()
    always.wrote_checkpoint()
    for seconds, due in ((151.0, False), (449.0, False), (450.0, True)):
        now = seconds
        assert pace.is_checkpoint_due() == due and always.is_checkpoint_due()


def test_a_hopeless_learning_rate_returns_the_model_it_was_given() -> None:
    teacher, student = make_model("bert"), disturbed("bert", "", noise=0.001)
    before = {name: weight.detach().clone() for name, weight in trainable_weights(student).items()}
    state = run(student, teacher, "states", learning_rate=1e8, max_gradient_norm=1e6, patience=2)
    assert state.best_step == 0
    assert state.step < 12
    assert all(torch.equal(weight, before[name]) for name, weight in trainable_weights(student).items())


@pytest.mark.parametrize(
    ("lengths", "rows"), [([10] * 40, 16), ([100] * 40, 5), ([900] * 4, 1), ([50, 150], 5), ([1] * 3, 16)]
)
def test_a_step_has_rows_up_to_its_tokens(lengths: list[int], rows: int) -> None:
    settings = HealingSettings(batch_rows=16, batch_tokens=512)
    assert rows_a_step([[1] * length for length in lengths], settings) == rows


@pytest.mark.parametrize(("num_rows", "epochs"), [(64, 7), (65, 6), (500, 2)])
def test_little_text_is_read_more_often(num_rows: int, epochs: int) -> None:
    """Four rows a step: 16 steps an epoch, 17 and 125, of which there should be 100 in all."""
    settings = settled(epochs=2, min_steps=100, batch_rows=4)
    assert num_epochs([[1] * 10] * num_rows, settings) == epochs


def test_embeddings_stay_as_they_are() -> None:
    teacher, student = make_model("bert"), disturbed("bert", "")
    before = student.embeddings.word_embeddings.weight.detach().clone()
    run(student, teacher, "states", epochs=1)
    assert torch.equal(student.embeddings.word_embeddings.weight, before)


def test_a_stopped_run_gives_the_same_bytes(tmp_path: Path) -> None:
    teacher = make_model("bert")
    whole = disturbed("bert", "")
    run(whole, teacher, "states")
    path = tmp_path / "state.safetensors"

    class Stopped(Exception):
        pass

    def stop(state: HealingState, weights: dict[str, torch.Tensor], optimizer: Any) -> None:
        if state.step == 5:
            state.save(path, weights, optimizer)
            raise Stopped

    settings = settled(epochs=2, batch_rows=8, learning_rate=3e-3, checkpoint_minutes=0)
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    common: dict[str, Any] = {"makes": "states", "settings": settings, "seed": 0}
    with pytest.raises(Stopped):
        heal(disturbed("bert", ""), teacher, data(), resume=nothing, checkpoint=stop, **common)
    resumed = disturbed("bert", "")

    def resume(weights: dict[str, torch.Tensor], optimizer: Any) -> HealingState:
        state = HealingState.load(path, weights, optimizer)
        assert state.step == 5
        return state

    heal(resumed, teacher, data(), resume=resume, checkpoint=nothing, **common)
    for name, weight in trainable_weights(resumed).items():
        assert torch.equal(weight, trainable_weights(whole)[name]), name


def test_quantization_in_mind_leaves_weights_on_the_grid() -> None:
    teacher, student = make_model("bert"), disturbed("bert", "")
    linears = [layer.intermediate.dense for layer in student.encoder.layer]
    fake_quantized(linears, num_bits=8, group_size=None)
    state = run(student, teacher, "states", epochs=1)
    settle(linears)
    assert state.best_loss < state.first_loss
    for linear in linears:
        weight = linear.weight.detach()
        assert torch.equal(fake_quantize(weight, num_bits=8, group_size=None), weight)
