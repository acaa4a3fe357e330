"""How close a compressed model stays to its original on held-out text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.model_inputs import Batch
from ffsplit.errors import FFSplitError
from ffsplit.models.family import Makes
from ffsplit.models.load import classifies, row_logits
from ffsplit.models.names import base_of
from ffsplit.models.streamed import StreamedModel
from ffsplit.store.manifest import BlockFidelity

LARGEST_LOSS = 700.0
"""In nats. A perplexity above e^700 may overflow a float, and carries no more information."""


def fidelity(original: Any, compressed: Any, batches: Iterable[Batch], *, makes: Makes) -> dict[str, float]:
    """Models that predict tokens: KL, agreement, perplexity. All others: mean cosines of their last states or
    embeddings; for classifiers also the error of their logits."""
    if makes in ("next_tokens", "target"):
        return token_fidelity(original, compressed, batches)
    if makes == "embeddings":
        return embedding_fidelity(original, compressed, batches)
    if classifies(original):
        return classifier_fidelity(original, compressed, batches)
    return encoder_fidelity(original, compressed, batches)


@torch.no_grad()
def encoder_fidelity(original: Any, compressed: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cosines of last states over tokens (`token_cosine`) and rows (`pooled_cosine`), in [-1, 1].

    The states are the base model's; for a model with a decoder, the decoder's. Masked positions do not count.
    Without a mask all positions count.
    """
    return _mean_cosines([_cosine_sums(original, compressed, batch) for batch in batches])


@torch.no_grad()
def classifier_fidelity(original: Any, compressed: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """As `encoder_fidelity`, and over rows: the fraction with the same top label (`label_agreement`),
    and the logits' squared error over their square (`logit_error`).

    An offset common to all labels of a row affects neither.
    """
    cosines, sums = [], torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        cosines.append(_cosine_sums(original, compressed, batch))
        a_BL, b_BL = (row_logits(model, batch.arguments) for model in (original, compressed))
        same = (a_BL.argmax(-1) == b_BL.argmax(-1)).sum()
        found = (same, (b_BL - a_BL).square().sum(), a_BL.square().sum())
        sums += torch.tensor([batch.num_rows, *map(float, found)], dtype=torch.float64)
    num_rows, num_same, error, square = sums.tolist()
    scores = {"label_agreement": num_same / num_rows, "logit_error": error / max(square, 1e-300)}
    return _mean_cosines(cosines) | scores


def _cosine_sums(original: Any, compressed: Any, batch: Batch) -> tuple[float, float, int, int]:
    """Sums over one batch of the tokens' and the pooled rows' cosines, and the number of each."""
    a_BTD, b_BTD = (hidden_states(model, batch) for model in (original, compressed))
    mask_BT = mask_of(batch, a_BTD)
    mask_BT1 = mask_BT.unsqueeze(-1)
    cosine_BT = functional.cosine_similarity(a_BTD, b_BTD, dim=-1)
    a_BD, b_BD = ((state * mask_BT1).sum(1) / mask_BT1.sum(1) for state in (a_BTD, b_BTD))
    token_sum = float((cosine_BT * mask_BT).sum(dtype=torch.float64))
    pooled_sum = float(functional.cosine_similarity(a_BD, b_BD, dim=-1).sum(dtype=torch.float64))
    return token_sum, pooled_sum, int(mask_BT.sum()), batch.num_rows


def _mean_cosines(sums: Sequence[tuple[float, float, int, int]]) -> dict[str, float]:
    token_sum, pooled_sum, num_tokens, num_rows = (sum(each) for each in zip(*sums, strict=True))
    return {"token_cosine": token_sum / num_tokens, "pooled_cosine": pooled_sum / num_rows}


def mask_of(batch: Batch, states_BTD: Tensor) -> Tensor:
    """Which positions of last states are tokens: [rows, tokens] of 0 and 1.

    All of them, where a model merges or adds positions, so that the mask has another length.
    """
    decoded = "decoder_input_ids" in batch.arguments
    mask = batch.arguments.get("decoder_attention_mask" if decoded else "attention_mask")
    if mask is None or mask.shape != states_BTD.shape[:2]:
        return states_BTD.new_ones(states_BTD.shape[:2], dtype=torch.long)
    return mask


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """The last states, whatever the model's head: [rows, tokens, D] float32."""
    base = base_of(model)
    if "decoder_input_ids" in batch.arguments:
        found = base(**batch.arguments, output_hidden_states=True)
        decoded = getattr(found, "decoder_hidden_states", None)
        states: Tensor = found[0] if decoded is None else decoded[-1]
    else:
        found = base(**batch.arguments)[0]
        states = found if isinstance(found, Tensor) else found[-1]  # of maps of features, the last
    if states.dim() == 4 and "pixel_values" in batch.arguments:  # channels first
        states = states.flatten(2).transpose(1, 2)
    elif states.dim() > 3:  # of a transducer, which scores pairs of positions
        states = states.flatten(1, -2)
    return (states if states.dim() == 3 else states[:, None]).float()  # a head's logits are one state


_EMBEDDINGS = re.compile(r"(\w+)_embed(s|dings)")


@torch.no_grad()
def embedding_fidelity(original: Any, compressed: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cosines over rows of each embedding that a model returns, in [-1, 1]: `image_cosine` and more."""
    sums: dict[str, float] = {}
    num_rows = 0
    for batch in batches:
        first, second = (model(**batch.arguments) for model in (original, compressed))
        for field, found in first.items():
            match = _EMBEDDINGS.fullmatch(field)
            if match is None or not isinstance(found, Tensor):
                continue
            a_BD, b_BD = (each[field].float() for each in (first, second))
            if found.dim() == 3:
                a_BD, b_BD = a_BD.mean(1), b_BD.mean(1)
            cosine = functional.cosine_similarity(a_BD, b_BD, dim=-1).sum(dtype=torch.float64)
            sums[f"{match[1]}_cosine"] = sums.get(f"{match[1]}_cosine", 0.0) + float(cosine)
        num_rows += batch.num_rows
    if not sums:
        raise FFSplitError("fidelity: the model returns no embeddings to compare")
    return {name: total / num_rows for name, total in sums.items()}


def token_logits(model: Any, batch: Batch) -> Tensor:
    """A decoder's logits [rows, length, vocabulary], by whatever name the model returns them."""
    found = model(**batch.arguments)
    name = "logits" if "logits" in found else next(each for each in found if each.endswith("logits"))
    logits: Tensor = found[name]
    return logits


def predicted_logits(model: Any, batch: Batch) -> Tensor:
    """The logits [T, vocabulary] of the tokens of a batch that can be predicted."""
    ids, follows = batch.predicted
    return token_logits(model, batch)[:, -ids.shape[1] : -1][follows[:, 1:]]


@torch.no_grad()
def token_fidelity(original: Any, compressed: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over predicted tokens, in nats: KL(original | compressed), top-1 agreement, perplexities.

    The tokens are those of a text, or of a decoder's target: no places of pictures or sounds.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for batch in batches:
        ids, follows = batch.predicted
        targets = ids[:, 1:][follows[:, 1:]]
        logits = [
            functional.log_softmax(predicted_logits(model, batch).float(), dim=-1)
            for model in (original, compressed)
        ]
        kl = functional.kl_div(logits[1], logits[0], log_target=True, reduction="sum")
        agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).sum()
        losses = [functional.nll_loss(each, targets, reduction="sum") for each in logits]
        sums += torch.stack([value.double().cpu() for value in (kl, agreement, *losses)])
        num_tokens += len(targets)
    means: list[float] = (sums / max(1, num_tokens)).tolist()
    mean_kl, mean_agreement, original_loss, compressed_loss = means
    if not all(map(math.isfinite, means)):
        raise FFSplitError("logits on held-out text are not finite: give a wider --dtype")
    return {
        "kl_divergence": mean_kl,
        "top1_agreement": mean_agreement,
        "original_perplexity": math.exp(min(original_loss, LARGEST_LOSS)),
        "compressed_perplexity": math.exp(min(compressed_loss, LARGEST_LOSS)),
    }


# Fidelity of a model that does not fit in memory: both models go through their blocks side by side.


def streamed_fidelity(
    original: StreamedModel, compressed: StreamedModel, batches: Sequence[Batch], *, makes: Makes
) -> tuple[dict[str, float], tuple[BlockFidelity, ...]]:
    """The result of `fidelity`, and how far the hidden states differ after each block.

    In memory at a time: one block of one model, and what lies outside the blocks of both.
    """
    assert batches, "no batches to compare on"
    for model in (original, compressed):
        model.start([batch.arguments for batch in batches])
    blocks = []
    for layer in range(len(original.blocks)):
        states = []
        for model in (original, compressed):
            with model.block(layer):
                states.append([hidden_of(model.advance(index)) for index in range(len(batches))])
        blocks.append(_compare(layer, states[0], states[1], batches))

    def recalled() -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            for model in (original, compressed):
                model.recall(index)
            yield batch.to(original.device)

    return fidelity(original.model, compressed.model, recalled(), makes=makes), tuple(blocks)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which may hold more."""
    states = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(states, Tensor)
    return states


def _compare(
    layer: int, original: Sequence[Tensor], compressed: Sequence[Tensor], batches: Sequence[Batch]
) -> BlockFidelity:
    """Over all tokens except padding: |h' - h| / |h|, and the mean cosine of h and h'."""
    error = total = cosine = 0.0
    num_tokens = 0
    for a_BTD, b_BTD, batch in zip(original, compressed, batches, strict=True):
        is_token = batch.attention_mask.bool()
        a_TD, b_TD = (states[is_token].float() for states in (a_BTD, b_BTD))
        error += float((b_TD - a_TD).square().sum(dtype=torch.float64))
        total += float(a_TD.square().sum(dtype=torch.float64))
        cosine += float(functional.cosine_similarity(a_TD, b_TD, dim=-1).sum(dtype=torch.float64))
        num_tokens += len(a_TD)
    relative = (error / total) ** 0.5 if total > 0 else 0.0
    return BlockFidelity(layer=layer, relative_error=relative, cosine=cosine / num_tokens)
