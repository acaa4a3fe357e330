"""A model is faithful to itself, and every number equals its definition computed directly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.errors import FFSplitError
from ffsplit.measurement.fidelity import embedding_fidelity, encoder_fidelity, fidelity, token_fidelity
from tests.tiny_families import make_model as make_family
from tests.tiny_models import make_model, random_rows

ROWS = random_rows(7, seed=5)


def batches(batch_tokens: int = 60) -> list[Batch]:
    return list(padded_batches(ROWS, batch_tokens=batch_tokens, pad_id=0))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("head", ["", "ForSequenceClassification"])
def test_an_encoder_is_faithful_to_itself(family: str, head: str) -> None:
    model = make_model(family, head=head)
    scores = fidelity(model, model, batches(), makes="states")
    expected = {"token_cosine": 1, "pooled_cosine": 1} | (
        {"label_agreement": 1, "logit_error": 0} if head else {}
    )
    assert scores == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_causal_model_is_faithful_to_itself(family: str) -> None:
    model = make_model(family, head="ForCausalLM")
    scores = fidelity(model, model, batches(), makes="next_tokens")
    assert scores["kl_divergence"] == 0
    assert scores["top1_agreement"] == 1
    assert scores["original_perplexity"] == scores["compressed_perplexity"]


@torch.no_grad()
def states_of(model: Any, row: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([row]))[0][0].double()


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_encoder_fidelity_by_its_definition(batch_tokens: int) -> None:
    original, compressed = make_model("bert"), make_model("bert", seed=1)
    token, pooled = [], []
    for row in ROWS:
        a_TD, b_TD = states_of(original, row), states_of(compressed, row)
        token += functional.cosine_similarity(a_TD, b_TD, dim=-1).tolist()
        pooled.append(float(functional.cosine_similarity(a_TD.mean(0), b_TD.mean(0), dim=0)))
    scores = encoder_fidelity(original, compressed, batches(batch_tokens))
    assert scores["token_cosine"] == pytest.approx(sum(token) / len(token), abs=1e-5)
    assert scores["pooled_cosine"] == pytest.approx(sum(pooled) / len(pooled), abs=1e-5)
    assert abs(scores["token_cosine"]) < 0.9


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_classifier_fidelity_by_its_definition(batch_tokens: int) -> None:
    original, compressed = (make_model("bert", head="ForSequenceClassification", seed=s) for s in (0, 1))
    with torch.no_grad():
        a_RL, b_RL = (
            torch.cat([model(input_ids=torch.tensor([row])).logits.double() for row in ROWS])
            for model in (original, compressed)
        )
    scores = fidelity(original, compressed, batches(batch_tokens), makes="states")
    same = (a_RL.argmax(1) == b_RL.argmax(1)).double().mean()
    assert scores["label_agreement"] == pytest.approx(float(same))
    a_RL, b_RL = (logits - logits.mean(1, keepdim=True) for logits in (a_RL, b_RL))
    error = (a_RL - b_RL).square().sum() / a_RL.square().sum()
    assert scores["logit_error"] == pytest.approx(float(error), rel=1e-4) and scores["logit_error"] > 0.01


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_token_fidelity_by_its_definition(batch_tokens: int) -> None:
    original, compressed = (make_model("llama", head="ForCausalLM", seed=seed) for seed in (0, 1))
    divergence, agreement = [], []
    losses: tuple[list[float], list[float]] = ([], [])
    for row in ROWS:
        p_TV, q_TV = (states_of(model, row)[:-1].log_softmax(-1) for model in (original, compressed))
        divergence += (p_TV.exp() * (p_TV - q_TV)).sum(-1).tolist()
        agreement += (p_TV.argmax(-1) == q_TV.argmax(-1)).tolist()
        for each, log_TV in zip(losses, (p_TV, q_TV), strict=True):
            each += [-float(log_TV[position, token]) for position, token in enumerate(row[1:])]
    scores = token_fidelity(original, compressed, batches(batch_tokens))
    assert scores["kl_divergence"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-4)
    assert scores["top1_agreement"] == pytest.approx(sum(agreement) / len(agreement))
    for name, each in zip(("original_perplexity", "compressed_perplexity"), losses, strict=True):
        assert scores[name] == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-4)


def test_perplexity_is_the_models_own_loss() -> None:
    """transformers' loss of one unpadded row, which it shifts by itself."""
    model = make_model("opt", head="ForCausalLM")
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    scores = token_fidelity(model, model, [Batch.of_tokens(ids, torch.ones_like(ids))])
    assert scores["original_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_embeddings_of_each_medium_are_compared() -> None:
    batch = Batch({"input_ids": torch.zeros(3, 1)})

    def embeds(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        fields = {"image_embeddings": (3, 5, 4), "text_embeds": (3, 4)}
        found = {name: torch.randn(shape, generator=generator) for name, shape in fields.items()}
        return lambda **_: found | {"logits": torch.zeros(3, 3)}

    a, b = embeds(0), embeds(1)
    scores = embedding_fidelity(a, b, [batch])
    cosine = functional.cosine_similarity
    expected = {
        "image_cosine": cosine(a()["image_embeddings"].mean(1), b()["image_embeddings"].mean(1)).mean(),
        "text_cosine": cosine(a()["text_embeds"], b()["text_embeds"]).mean(),
    }
    assert scores == {name: pytest.approx(float(value), abs=1e-6) for name, value in expected.items()}
    with pytest.raises(FFSplitError, match="returns no embeddings"):
        embedding_fidelity(lambda **_: {}, lambda **_: {}, [batch])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_is_compared_by_the_logits_of_its_target(family: str) -> None:
    model = make_family(family, "ForConditionalGeneration")
    ids = torch.tensor([[7, 8, 9, 10]])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)}
    arguments["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0]])
    scores = fidelity(model, model, [Batch(arguments)], makes="target")
    with torch.no_grad():
        log_TV = model(**arguments).logits[0].log_softmax(-1)
    expected = -(log_TV[0, 9] + log_TV[1, 8]) / 2
    assert scores["original_perplexity"] == pytest.approx(math.exp(float(expected)), rel=1e-4)
    assert scores["kl_divergence"] == 0


def test_logits_that_are_not_finite_are_an_error() -> None:
    original, compressed = (make_model("llama", head="ForCausalLM") for _ in range(2))
    with torch.no_grad():
        compressed.lm_head.weight[3, 4] = torch.inf
    with pytest.raises(FFSplitError, match=r"not finite.*--dtype"):
        token_fidelity(original, compressed, batches())
