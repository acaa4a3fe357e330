"""Tiny checkpoints compressed by any recipe, and the in-memory model that each must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit.calibration.hooks import FFNObserver, Sampling
from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compressors.layer import compress_layer
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.ffn.weights import FFNWeights
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_base_model, load_whole_model
from ffsplit.runtime.assemble import MAX_SHARD_BYTES, assemble, is_plain, keeps_names
from ffsplit.runtime.ffn_tensors import layer_tensors, load_ffn
from ffsplit.splitting.layer import uniform_layouts
from ffsplit.splitting.scores import plan_split
from tests.short_recipes import short_recipe
from tests.tiny_models import CAUSAL, random_rows

CPU = torch.device("cpu")
BLOCK_MODULES = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "electra"),
        ("encoder.layer", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ),
    "distilbert": ("transformer.layer", "ffn.lin1", "ffn.activation", "ffn.lin2"),
    "opt": ("decoder.layers", "fc1", "activation_fn", "fc2"),
}
Compress = Callable[..., "Compressed"]


class Compressed(NamedTuple):
    """A compressed checkpoint on disk, and what it was made of."""

    source: Checkpoint
    directory: Path
    layouts: tuple[LayerLayout, ...]
    weights: tuple[FFNWeights, ...]
    plain: bool


def head_of(family: str) -> str:
    return "ForCausalLM" if family in CAUSAL else "ForSequenceClassification"


@cache
def observed(directory: Path) -> tuple[tuple[NeuronStats, ...], Sequence[Tensor]]:
    checkpoint = open_checkpoint(directory)
    model = load_base_model(open_checkpoint(directory), device=CPU, dtype=torch.float32)
    rows = random_rows(40, seed=7)
    sampling = Sampling(torch.arange, {"attention_mask": sum(map(len, rows))}, len(rows))
    with torch.no_grad(), FFNObserver(model, checkpoint.ffns, sampling=sampling) as observer:
        for batch in padded_batches(rows, batch_tokens=256, pad_id=0):
            observer.next_batch(batch.arguments)
            model(**batch.arguments)
    return observer.statistics(), [tensors["input"] for tensors in observer.inputs().values()]


def compress(
    source: Path,
    target: Path,
    *,
    recipe: str,
    keep: float | Sequence[float] = 0.3535,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Compressed:
    """Compress as a run does, in one process and with short fits; `keep` may differ from layer to layer."""
    checkpoint, chosen = open_checkpoint(source), short_recipe(recipe)
    keeps = [keep] * len(checkpoint.ffns) if isinstance(keep, float) else keep
    layouts = tuple(
        uniform_layouts([shape], keep=each, heavy=chosen.heavy, steps=chosen.steps)[0]
        for shape, each in zip(checkpoint.shapes, keeps, strict=True)
    )
    statistics, inputs = observed(source)
    plain = is_plain(checkpoint, layouts)
    activation = activation_named(checkpoint.activation)
    target.mkdir(parents=True, exist_ok=True)
    files, weights = [], []
    for plan in plan_split(statistics, layouts, score=chosen.score):
        layer = compress_layer(
            load_ffn(checkpoint, plan.layer, activation=activation, device=CPU),
            heavy_neurons=plan.heavy_neurons,
            layout=plan.layout,
            steps=chosen.steps,
            inputs=[inputs[plan.layer]],
        )
        weights.append(layer.weights)
        files.append(target.with_name(f"{target.name}-layer-{plan.layer:03d}.safetensors"))
        named = keeps_names(checkpoint, layouts)
        save_file(layer_tensors(checkpoint, plan.layer, layer.weights, plain=named), files[-1])
    assemble(checkpoint, files, layouts, target, max_shard_bytes=max_shard_bytes)
    return Compressed(checkpoint, target, layouts, tuple(weights), plain)


class _Runs(nn.Module):
    """An FFNWeights as a module."""

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x)


def reference(compressed: Compressed) -> Any:
    """The dense model with each FFN replaced in memory: whatever comes before `down` passes x on."""
    checkpoint = compressed.source
    model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
    base = getattr(model, model.base_model_prefix, model)
    family = checkpoint.architecture.model_type
    for layer, weights in enumerate(compressed.weights):
        if family in BLOCK_MODULES:
            blocks, up, activation, down = BLOCK_MODULES[family]
            block = base.get_submodule(f"{blocks}.{layer}")
            block.set_submodule(up, nn.Identity())
            owner, _, name = activation.rpartition(".")
            setattr(block.get_submodule(owner), name, nn.Identity())
            block.set_submodule(down, _Runs(weights))
        else:
            base.layers[layer].mlp = _Runs(weights)
    return model


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Logits, or last hidden states, on a padded batch; only what belongs to tokens is compared."""
    (batch,) = padded_batches(random_rows(4, seed=9), batch_tokens=10_000, pad_id=0)
    result = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0].float()
    return result[batch.attention_mask.bool()] if result.dim() == 3 else result
