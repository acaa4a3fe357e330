"""A tiny random model of every family in the table and of others of every shape, and what to give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ffsplit.measurement.latency import example_inputs
from ffsplit.models.architectures import ARCHITECTURES
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
_WHISPER = {"max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 8}
_WHISPER |= {"suppress_tokens": [], "begin_suppress_tokens": []}
_SOUND = {"vocab_size": 32, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 4]}
_SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_MOE = _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_ENCODER_HEADS = ("ForMaskedLM", *_CLASSIFIERS)
_DECODER_HEADS = ("ForCausalLM", "ForSequenceClassification")
_HEADS: dict[str, tuple[str, ...]] = {
    "bert": ("ForPreTraining", "ForNextSentencePrediction", *_ENCODER_HEADS),
    "electra": ("ForPreTraining", *_ENCODER_HEADS),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "mpnet", "deberta-v2", "distilbert", "modernbert"), _ENCODER_HEADS
    ),
    "gpt2": ("LMHeadModel", "DoubleHeadsModel", *_CLASSIFIERS),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom", "llama"), ("ForCausalLM", *_CLASSIFIERS)),
    **dict.fromkeys(
        ("opt", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "starcoder2", "mixtral"), _DECODER_HEADS
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _DECODER_HEADS),
    "gemma3_text": ("ForCausalLM", "TextForSequenceClassification"),
    "t5": ("ForConditionalGeneration", "EncoderModel"),
    "bart": ("ForConditionalGeneration",),
    "marian": ("MTModel",),
    "whisper": ("ForConditionalGeneration", "ForAudioClassification"),
    "vit": ("ForImageClassification", "ForMaskedImageModeling"),
    "clip": ("ForImageClassification",),
    "siglip": ("ForImageClassification",),
    "wav2vec2": ("ForCTC", "ForSequenceClassification"),
}
"""The task heads that are tried with each family of the table, as class name endings."""


class Family(NamedTuple):
    """How a family's classes are called, its config, and what differs from the table of what works."""

    prefix: str
    config: dict[str, Any]
    model_type: str = ""
    usual_head: str | None = None
    heads: tuple[str, ...] = ()
    """For a family without a row in the table."""


def _bert(prefix: str, **more: Any) -> Family:
    return Family(prefix, _TEXT | more)


_GPT2 = _IDS | {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": 64}
_BLOOM = _IDS | {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "n_layer": NUM_LAYERS, "n_head": 2}
_FALCON = _TEXT | {"ffn_hidden_size": 32}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}

_FUNNEL = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
_FUNNEL |= {"block_sizes": [1, 1], "num_decoder_layers": 1, "max_position_embeddings": 64, "pad_token_id": 0}
_LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4}
_DEEPSEEK = _TEXT | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_DEEPSEEK |= {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2}
_DEEPSEEK |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24}
_DEEPSEEK |= {"num_key_value_heads": 2, "head_dim": 4}
_NEMOTRON = _LLAMA | {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "ssm_state_size": 4}
_NEMOTRON |= {"mamba_num_heads": 2, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "conv_kernel": 2}
_NEMOTRON |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_NEMOTRON |= {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
_SWIN |= {"window_size": 2, "mlp_ratio": 4.0}

_SEGFORMER = {"depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [8, 16], "sr_ratios": [2, 1]}
_SEGFORMER |= {"num_attention_heads": [1, 2], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [4, 4]}
_SEGFORMER |= {"decoder_hidden_size": 16, "image_size": 16}
_LEVIT = {"image_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2]}
_LEVIT |= {"depths": [1, 1, 1], "key_dim": [4, 4, 4]}

FAMILIES: dict[str, Family] = {
    "bert": _bert("Bert"),
    "roberta": _bert("Roberta"),
    "xlm-roberta": _bert("XLMRoberta"),
    "electra": _bert("Electra", embedding_size=8),
    "distilbert": Family(
        "DistilBert",
        _IDS
        | {"vocab_size": VOCAB_SIZE, "dim": 16, "hidden_dim": 32, "n_layers": NUM_LAYERS, "n_heads": 2}
        | {"max_position_embeddings": 64},
    ),
    "mpnet": _bert("MPNet"),
    "deberta-v2": _bert("DebertaV2", **_RELATIVE),
    "modernbert": _bert("ModernBert", cls_token_id=2, sep_token_id=3),
    "gpt2": Family("GPT2", _GPT2),
    "gpt_neox": Family("GPTNeoX", _TEXT),
    "opt": Family("OPT", _TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "llama": Family("Llama", _LLAMA | {"mlp_bias": True}),
    "mistral": Family("Mistral", _LLAMA),
    "qwen2": Family("Qwen2", _LLAMA),
    "qwen3": Family("Qwen3", _LLAMA),
    "gemma2": Family("Gemma2", _LLAMA),
    "gemma3_text": Family("Gemma3", _LLAMA),
    "gemma3": Family(
        "Gemma3",
        {"text_config": _LLAMA | {"sliding_window": 32}, "vision_config": _PIXELS, "mm_tokens_per_image": 4}
        | {"image_token_index": VOCAB_SIZE - 1},
        heads=("ForConditionalGeneration", "ForSequenceClassification"),
    ),
    "phi3": Family("Phi3", _LLAMA),
    "falcon": Family("Falcon", _FALCON),
    "bloom": Family("Bloom", _BLOOM),
    "starcoder2": Family("Starcoder2", _LLAMA),
    "mixtral": Family("Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": Family("Qwen2Moe", _MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}),
    "qwen3_moe": Family("Qwen3Moe", _MOE | {"mlp_only_layers": [0]}),
    "t5": Family("T5", _T5),
    "t5-gated": Family("T5", _T5 | {"feed_forward_proj": "gated-gelu"}, "t5"),
    "bart": Family("Bart", _ENCODER_DECODER | {"max_position_embeddings": 64}),
    "marian": Family("Marian", _ENCODER_DECODER | {"max_position_embeddings": 64}),
    "whisper": Family("Whisper", _ENCODER_DECODER | _WHISPER),
    "vit": Family("ViT", _PIXELS),
    "clip": Family(
        "CLIP",
        {"text_config": _TEXT, "vision_config": _PIXELS, "projection_dim": 8},
        usual_head="",
    ),
    "siglip": Family(
        "Siglip",
        {"text_config": _TEXT | {"projection_size": 16}, "vision_config": _PIXELS},
        usual_head="",
    ),
    "wav2vec2": Family("Wav2Vec2", _SIZES | _IDS | _SOUND),
    "albert": Family("Albert", _TEXT | {"embedding_size": 8}, heads=("ForMaskedLM",)),
    "esm": Family("Esm", _TEXT | {"mask_token_id": 4}, heads=("ForMaskedLM",)),
    "mobilebert": Family(
        "MobileBert",
        _TEXT
        | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
        | {"num_feedforward_networks": 2},
        heads=("ForMaskedLM",),
    ),
    "funnel": Family("Funnel", _FUNNEL, heads=("ForMaskedLM",)),
    "mbart": Family(
        "MBart", _ENCODER_DECODER | {"max_position_embeddings": 64}, heads=("ForConditionalGeneration",)
    ),
    "led": Family("LED", _ENCODER_DECODER | _LED, heads=("ForConditionalGeneration",)),
    "apertus": Family("Apertus", _LLAMA, heads=("ForCausalLM",)),
    "glm": Family("Glm", _LLAMA, heads=("ForCausalLM",)),
    "deepseek_v3": Family("DeepseekV3", _DEEPSEEK, heads=("ForCausalLM",)),
    "nemotron_h": Family("NemotronH", _NEMOTRON, heads=("ForCausalLM",)),
    "gpt_oss": Family(
        "GptOss",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
        heads=("ForCausalLM",),
    ),
    "gte": Family("Gte", _TEXT, heads=("ForMaskedLM",)),
    "swin": Family("Swin", _SWIN, heads=("ForImageClassification",)),
    "segformer": Family("Segformer", _SEGFORMER, heads=("ForImageClassification",)),
    "levit": Family("Levit", _LEVIT, heads=("ForImageClassification",)),
    "beit": Family("Beit", _PIXELS, heads=("ForImageClassification",)),
    "hubert": Family("Hubert", _SIZES | _IDS | _SOUND, heads=("ForCTC",)),
    "llava": Family(
        "Llava",
        {"text_config": _LLAMA | {"model_type": "llama"}, "image_token_id": VOCAB_SIZE - 1}
        | {"vision_config": _PIXELS | {"model_type": "clip_vision_model"}},
        heads=("ForConditionalGeneration",),
    ),
    "relu2": Family("Llama", _LLAMA | {"hidden_act": "relu2"}, "llama"),
}
"""By model_type; `relu2` is a Llama with squared ReLU."""


FAMILIES = {
    name: family
    for name, family in FAMILIES.items()
    if hasattr(transformers, f"{family.prefix}Model") or hasattr(transformers, f"{family.prefix}TextModel")
}  # older versions of transformers lack some

ROWS = tuple(name for name, family in FAMILIES.items() if (family.model_type or name) in ARCHITECTURES)
"""Those with a row in the table."""


def heads_of(family: str) -> tuple[str, ...]:
    """The task heads that are tried with a family, beside its base model."""
    return FAMILIES[family].heads or _HEADS[FAMILIES[family].model_type or family]


def usual_head(family: str) -> str:
    """The head that a family is mostly used with."""
    usual = FAMILIES[family].usual_head
    return heads_of(family)[0] if usual is None else usual


def make_model(family: str, head: str = "") -> Any:
    """A random model in eval mode; without a head, the base model."""
    prefix, config, *_ = FAMILIES[family]
    base = "TextModel" if family == "gemma3_text" else "Model"
    chosen = getattr(transformers, f"{prefix}{head or base}")
    model = chosen(chosen.config_class(**config))
    randomize(model, seed=0)
    return model.eval()


def save_checkpoint(
    directory: Path, family: str, head: str = "", *, dtype: torch.dtype = torch.float32
) -> Path:
    """A random model on disk, with what turns rows into its inputs."""
    model = make_model(family, head).to(dtype)
    model.save_pretrained(directory)
    reads = type(model).main_input_name
    if reads not in ("input_values", "pixel_values") or family in ("clip", "siglip"):
        save_tokenizer(directory)
    if reads == "pixel_values" or family in ("clip", "siglip", "llava"):
        side = {"height": 16, "width": 16}
        processor = transformers.ViTImageProcessorPil(size=side, do_resize=True)
        processor.save_pretrained(directory)
    if reads == "input_values":
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(directory)
    if reads == "input_features":
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(directory)
    return directory


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """What a model makes of two rows, one padded where it reads tokens: its floats, but those of padding."""
    inputs = example_inputs(model, num_rows=2, num_tokens=6)
    if "input_ids" in inputs and "attention_mask" in inputs:
        inputs["input_ids"][1, 3:] = 0
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0
    found = model(**inputs)
    states = found[0] if "image_embeds" not in found else torch.cat([found.image_embeds, found.text_embeds])
    mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    if mask is None or states.shape[:2] != mask.shape:
        return states.float()
    return states[mask.bool()].float()
