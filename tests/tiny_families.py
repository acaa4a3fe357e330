"""A tiny random model of every family in the table, and what to give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from tests.tiny_models import VOCAB_SIZE, randomize, save_tokenizer

NUM_LAYERS = 2
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_TEXT = _SIZES | _IDS | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64}
_LLAMA = _TEXT | {"num_key_value_heads": 1, "head_dim": 8}
_ENCODER_DECODER = _IDS | {
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "encoder_layers": NUM_LAYERS,
    "decoder_layers": NUM_LAYERS,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": 3,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": NUM_LAYERS,
    "num_decoder_layers": 1,
    "num_heads": 2,
}
_T5 |= {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
_PIXELS = _SIZES | {"image_size": 16, "patch_size": 8}
_MOE = _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_ENCODER_HEADS = ("ForMaskedLM", *_HEADS)


class Family(NamedTuple):
    """How a family's classes are called, its config, and the heads that are tried beside the base model."""

    prefix: str
    config: dict[str, Any]
    heads: tuple[str, ...]
    model_type: str = ""


def _bert(prefix: str, heads: tuple[str, ...] = _ENCODER_HEADS, **more: Any) -> Family:
    return Family(prefix, _TEXT | more, heads)


def _decoder(prefix: str, config: dict[str, Any] = _LLAMA, heads: tuple[str, ...] = _HEADS[:1]) -> Family:
    return Family(prefix, config, ("ForCausalLM", *heads))


_GPT2 = _IDS | {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": 64}
_BLOOM = _IDS | {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "n_layer": NUM_LAYERS, "n_head": 2}
_FALCON = _TEXT | {"ffn_hidden_size": 32}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}

FAMILIES: dict[str, Family] = {
    "bert": _bert("Bert", ("ForPreTraining", "ForNextSentencePrediction", *_ENCODER_HEADS)),
    "roberta": _bert("Roberta"),
    "xlm-roberta": _bert("XLMRoberta"),
    "electra": _bert("Electra", ("ForPreTraining", *_ENCODER_HEADS), embedding_size=8),
    "distilbert": Family(
        "DistilBert",
        _IDS
        | {"vocab_size": VOCAB_SIZE, "dim": 16, "hidden_dim": 32, "n_layers": NUM_LAYERS, "n_heads": 2}
        | {"max_position_embeddings": 64},
        _ENCODER_HEADS,
    ),
    "mpnet": _bert("MPNet"),
    "deberta-v2": _bert("DebertaV2", **_RELATIVE),
    "modernbert": _bert("ModernBert", cls_token_id=2, sep_token_id=3),
    "gpt2": Family("GPT2", _GPT2, ("LMHeadModel", "DoubleHeadsModel", *_HEADS)),
    "gpt_neox": _decoder("GPTNeoX", _TEXT, _HEADS),
    "opt": _decoder("OPT", _TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "llama": _decoder("Llama", _LLAMA | {"mlp_bias": True}, _HEADS),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma2": _decoder("Gemma2"),
    "gemma3_text": Family("Gemma3", _LLAMA, ("ForCausalLM", "TextForSequenceClassification")),
    "phi3": _decoder("Phi3"),
    "falcon": _decoder("Falcon", _FALCON, _HEADS),
    "bloom": _decoder("Bloom", _BLOOM, _HEADS),
    "starcoder2": _decoder("Starcoder2"),
    "mixtral": _decoder("Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": _decoder(
        "Qwen2Moe", _MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
    ),
    "qwen3_moe": _decoder("Qwen3Moe", _MOE | {"mlp_only_layers": [0]}),
    "relu2": _decoder("Llama", _LLAMA | {"hidden_act": "relu2"}, ())._replace(model_type="llama"),
}
"""By model_type; `relu2` is a Llama with squared ReLU."""


def make_model(family: str, head: str = "") -> Any:
    """A random model in eval mode; without a head, the base model."""
    prefix, config, _, _ = FAMILIES[family]
    base = "TextModel" if family == "gemma3_text" else "Model"
    chosen = getattr(transformers, f"{prefix}{head or base}")
    model = chosen(chosen.config_class(**config))
    randomize(model, seed=0)
    return model.eval()


def save_checkpoint(
    directory: Path, family: str, head: str = "", *, dtype: torch.dtype = torch.float32
) -> Path:
    """A random model on disk, with what turns rows into its inputs."""
    make_model(family, head).to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """What a model makes of two rows, one of them padded: all its floats, those of padding left out."""
    ids = torch.tensor([[5, 50, 150, 199, 30, 77], [8, 9, 10, 0, 0, 0]])
    mask = (ids != 0).long()
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0
    found = model(input_ids=ids, attention_mask=mask)[0].float()
    return found[mask.bool()] if found.shape[:2] == ids.shape else found
