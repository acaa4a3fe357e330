"""What healing minimises for a causal language model, beside the distance of its logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ffsplit.calibration.model_inputs import Batch, padded
from ffsplit.healing import losses
from ffsplit.healing.loop import fresh_accelerator
from ffsplit.healing.losses import NO_LABEL, Distance, last_states, logits_of, next_tokens
from ffsplit.healing.settings import HealingSettings
from tests.tiny_models import make_model

BATCH = Batch.of_tokens(*padded([[5, 9, 7, 30], [8, 6]], pad_id=0))


def test_each_token_is_labelled_by_the_next_of_its_row() -> None:
    assert next_tokens(BATCH).tolist() == [9, 7, 30, NO_LABEL, 6, NO_LABEL]


@pytest.mark.parametrize(("text_share", "states_weight"), [(0.0, 0.0), (0.3, 0.0), (0.0, 2.0), (0.3, 2.0)])
def test_the_gradient_is_that_of_logits_text_and_states(
    text_share: float, states_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of two tokens, against the formula."""
    student, teacher = (make_model("llama", head="ForCausalLM", seed=seed).eval() for seed in (0, 1))
    vocabulary = teacher.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2 * vocabulary)
    distance = Distance.of(
        student,
        teacher,
        BATCH,
        makes="next_tokens",
        text_share=text_share,
        states_weight=states_weight,
    )
    assert distance.has_heads
    is_token = BATCH.attention_mask.bool()
    with torch.no_grad():
        target_TD = distance.outputs(teacher, BATCH)
        expected_TV = logits_of(teacher, BATCH)[is_token].log_softmax(-1)
    accelerator = fresh_accelerator(HealingSettings(mixed_precision="no"), torch.device("cpu"))
    distance.backward(BATCH, target_TD, factor=1 / distance.weight(target_TD), accelerator=accelerator)
    found = {name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None}

    student.zero_grad()
    logits_TV, states_TD = logits_of(student, BATCH)[is_token], last_states(student, BATCH)[is_token]
    kl = (expected_TV.exp() * (expected_TV - logits_TV.log_softmax(-1))).sum(-1).mean()
    text = functional.cross_entropy(logits_TV, next_tokens(BATCH), reduction="none").sum() / len(logits_TV)
    states = (states_TD - target_TD).square().sum(-1).mean() / target_TD.square().sum(-1).mean()
    ((1 - text_share) * kl + text_share * text + states_weight * states).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
