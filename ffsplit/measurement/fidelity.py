"""How close a compressed model stays to its original on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.batches import Batch
from ffsplit.errors import FFSplitError
from ffsplit.models.rows import ModelKind

LARGEST_LOSS = 700.0
"""In nats; a perplexity above e^700 is no float, and tells no more."""


def fidelity(
    original: Any, compressed: Any, batches: Iterable[Batch], *, kind: ModelKind
) -> dict[str, float]:
    """Encoders: mean cosine of token and of mean-pooled states. Causal LMs: KL, agreement, perplexity."""
    measure = encoder_fidelity if kind == "encoder" else causal_fidelity
    return measure(original, compressed, batches)


@torch.no_grad()
def encoder_fidelity(original: Any, compressed: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over tokens (`token_cosine`) and over rows (`pooled_cosine`) of base-model states, in [-1, 1]."""
    token_sum = pooled_sum = 0.0
    num_tokens = num_rows = 0
    for batch in batches:
        mask_BT1 = batch.attention_mask.unsqueeze(-1)
        a_BTD, b_BTD = (hidden_states(model, batch) for model in (original, compressed))
        cosine_BT = functional.cosine_similarity(a_BTD, b_BTD, dim=-1)
        a_BD, b_BD = ((state * mask_BT1).sum(1) / mask_BT1.sum(1) for state in (a_BTD, b_BTD))
        token_sum += float((cosine_BT * batch.attention_mask).sum(dtype=torch.float64))
        pooled_sum += float(functional.cosine_similarity(a_BD, b_BD, dim=-1).sum(dtype=torch.float64))
        num_tokens += batch.num_tokens
        num_rows += len(batch.input_ids)
    return {"token_cosine": token_sum / num_tokens, "pooled_cosine": pooled_sum / num_rows}


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """The base model's last states, whatever head is on it: [rows, tokens, D] float32."""
    base = getattr(model, model.base_model_prefix, model)
    states: Tensor = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    return states.float()


@torch.no_grad()
def causal_fidelity(original: Any, compressed: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over predicted tokens, in nats: KL(original | compressed), top-1 agreement, perplexities."""
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for batch in batches:
        is_target = batch.attention_mask[:, 1:].bool()
        targets = batch.input_ids[:, 1:][is_target]
        logits = []
        for model in (original, compressed):
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            logits.append(functional.log_softmax(output[:, :-1][is_target].float(), dim=-1))
        kl = functional.kl_div(logits[1], logits[0], log_target=True, reduction="sum")
        agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).sum()
        losses = [functional.nll_loss(each, targets, reduction="sum") for each in logits]
        sums += torch.stack([value.double().cpu() for value in (kl, agreement, *losses)])
        num_tokens += len(targets)
    means: list[float] = (sums / max(1, num_tokens)).tolist()
    mean_kl, mean_agreement, original_loss, compressed_loss = means
    if not all(map(math.isfinite, means)):
        raise FFSplitError("logits on held-out text are not finite: compute in a wider --dtype")
    return {
        "kl_divergence": mean_kl,
        "top1_agreement": mean_agreement,
        "original_perplexity": math.exp(min(original_loss, LARGEST_LOSS)),
        "compressed_perplexity": math.exp(min(compressed_loss, LARGEST_LOSS)),
    }
