"""Tiny random mixtures of experts of every kind of router, and the same models with experts masked out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from tests.tiny_families import FAMILIES
from tests.tiny_models import randomize, save_tokenizer

_TEXT = {name: FAMILIES["llama"].config[name] for name in FAMILIES["llama"].config if name != "mlp_bias"}
_DEEPSEEK = FAMILIES["deepseek_v3"].config
_GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}


class TinyMixture(NamedTuple):
    """A class of transformers, its config, its experts per block, and the router's path in a block."""

    prefix: str
    config: dict[str, Any]
    num_experts: int
    router: str


MIXTURES = {
    "mixtral": TinyMixture("Mixtral", FAMILIES["mixtral"].config, 4, "mlp.gate"),
    "qwen3_moe": TinyMixture("Qwen3Moe", FAMILIES["qwen3_moe"].config, 4, "mlp.gate"),
    "qwen2_moe": TinyMixture("Qwen2Moe", FAMILIES["qwen2_moe"].config, 4, "mlp.gate"),
    "olmoe": TinyMixture("Olmoe", _TEXT | {"num_experts": 4, "num_experts_per_tok": 2}, 4, "mlp.gate"),
    "gpt_oss": TinyMixture(
        "GptOss", _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}, 4, "mlp.router"
    ),
    "ernie4_5_moe": TinyMixture(
        "Ernie4_5_Moe", _TEXT | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}, 4, "mlp.gate"
    ),
    "deepseek_v3": TinyMixture("DeepseekV3", _DEEPSEEK, 4, "mlp.gate"),
    "deepseek_v3-grouped": TinyMixture("DeepseekV3", _DEEPSEEK | _GROUPS, 8, "mlp.gate"),
}
CORRECTION = "e_score_correction_bias"
"""A router's buffer that is added to the scores for the choice alone: Ernie's and DeepSeek's."""


def save_mixture(directory: Path, name: str, **overrides: Any) -> Path:
    """A random mixture on disk, with a tokenizer."""
    mixture = MIXTURES[name]
    chosen = getattr(transformers, f"{mixture.prefix}ForCausalLM")
    model = chosen(chosen.config_class(**(mixture.config | overrides)))
    randomize(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for path, buffer in model.named_buffers():
        if path.endswith(CORRECTION):
            buffer.copy_(0.1 * torch.rand(buffer.shape, generator=generator))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@contextmanager
def masked(model: Any, name: str, dropped: Mapping[int, Sequence[int]]) -> Iterator[Any]:
    """The model, whose routers score some experts minus infinity: `dropped` by layer."""
    routers = {}
    for layer, experts in dropped.items():
        router = model.model.layers[layer].get_submodule(MIXTURES[name].router)
        routers[id(router.weight)] = list(experts)
        for path, buffer in model.model.layers[layer].named_buffers():
            if path.endswith(CORRECTION):
                buffer[..., list(experts)] = -torch.inf
    plain = functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = plain(x, weight, bias)
        for each in routers.get(id(_source(weight)), ()):
            logits[..., each] = -torch.inf
        return logits

    with patch.object(functional, "linear", linear):
        yield model


def _source(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base
