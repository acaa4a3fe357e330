"""What the other files' rules miss, by model type."""

from __future__ import annotations

from typing import Any

CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "bark": "BarkModel",
    "clip": "CLIPModel",
    "shieldgemma2": "ShieldGemma2ForImageClassification",
}
"""The class to make, where the first of transformers' mappings is not the most used one."""

PICTURES: dict[str, int] = dict.fromkeys(("deformable_detr", "mask2former", "maskformer"), 128)
"""Pixels of a side of pictures, where a norm over the smallest of a pyramid's maps needs more than one."""

DROP = "DROP"
"""A field that is left out of the config."""

_MROPE: dict[str, Any] = {"rope_parameters": {"mrope_section": [2, 1, 1]}}
_HALF_MROPE: dict[str, Any] = {"rope_parameters": {"mrope_section": [1, 1, 0]}}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_NO_TIMM: dict[str, Any] = {
    "start": {"backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None},
    "backbone_config": _RESNET,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8}
_NO_PLE: dict[str, Any] = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_ASSISTANT: dict[str, Any] = {**_NO_PLE, "num_kv_shared_layers": 2}
_GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [40, 40, 48, 48],
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_COMPASS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
}
_HUNYUAN: dict[str, Any] = {"head_dim": 8}
_HUNYUAN_VL: dict[str, Any] = {"head_dim": 8, **_MROPE}
_DEEPSEEK: dict[str, Any] = {"num_experts_per_tok": 2}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 2,
    "hc_lowrank": 16,
}
_GLM5: dict[str, Any] = {"index_topk": 16, "index_kpool": 4}
_ZAMBA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
_DOTS3: dict[str, Any] = {
    "2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "head_dim": 12,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "qk_rope_head_dim": 4,
    }
}
_NARROW: dict[str, Any] = {"hidden_size": 16, "num_heads": 2}
_WINDOWS: dict[str, Any] = {"num_windows": 4, "num_windows_side": 2}
_HIERA: dict[str, Any] = {"hidden_size": 12}
_SERIES: dict[str, Any] = {"start": {"prediction_length": 4}, "prediction_length": 4, "context_length": 8}
_BIG: dict[str, Any] = {"hidden_size": 64}
_CLVP: dict[str, Any] = {"hidden_size": 128}
_GEMMA4_MOE: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "audio-spectrogram-transformer": {"max_length": 64},
    "autoformer": _SERIES,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 200},
    "bridgetower": {**_BIG, "text_config": _BIG, "vision_config": _BIG},
    "bros": {"dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 200, "IMGIMGAZ": 201, "IMGIMGBZ": 202}},
    "clap": {"audio_config": {"num_mel_bins": 64, "patch_embeds_hidden_size": 32, "hidden_size": 256}},
    "clvp": {"text_config": _CLVP, "speech_config": _CLVP, "decoder_config": _CLVP},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "colqwen2": {"vlm_config": {"text_config": _MROPE}},
    "conditional_detr": _NO_TIMM,
    "cvt": {"depth": [1, 2, 3]},
    "dab-detr": _NO_TIMM,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_ocr2": {
        "text_config": {**_DEEPSEEK, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    },
    "deepseek_v2": {**_DEEPSEEK, "first_k_dense_replace": 1},
    "deformable_detr": _NO_TIMM,
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "detr": _NO_TIMM,
    "diffusion_gemma": {"text_config": _GEMMA4_MOE},
    "distilbert": {"hidden_dim": 40},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {"text_config": {"per_layer_config": _DOTS3}},
    "dots3_note_text": {"per_layer_config": _DOTS3},
    "efficientloftr": {"hidden_size": 256},
    "embedding_gemma2": {
        "start": {"vision_config": {}, "audio_config": {}},
        "vision_config": {"position_embedding_size": 128},
    },
    "emu3": {"vocabulary_map": {"<image>": 200, "<|extra_200|>": 201}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "esmc": {"vocab_size": 211},
    "esm": {"vocab_size": 211, "pad_token_id": 1, "mask_token_id": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {
        "start": {"vision_config": {}, "audio_config": {}},
        "vision_config": {"position_embedding_size": 128},
    },
    "gemma4_assistant": {
        "start": {"text_config": {**_NO_PLE, "num_kv_shared_layers": 30}},
        "text_config": _ASSISTANT,
    },
    "gemma4_text": _GEMMA4_MOE,
    "gemma4_unified": {"start": {"vision_config": {}, "audio_config": {}}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "glm46v": {"text_config": _MROPE, "vision_config": _NARROW},
    "glm4v": {"text_config": _MROPE, "vision_config": _NARROW},
    "glm4v_moe": {"text_config": _HALF_MROPE, "vision_config": _NARROW},
    "glm4v_moe_text": _HALF_MROPE,
    "glm4v_moe_vision": _NARROW,
    "glm4v_text": _MROPE,
    "glm4v_vision": _NARROW,
    "glm5_next": {"text_config": _GLM5},
    "glm5_next_text": _GLM5,
    "glm_image": {"text_config": _MROPE},
    "glm_image_text": _MROPE,
    "glm_ocr": {"text_config": _MROPE},
    "glm_ocr_text": _MROPE,
    "glmga": {"text_config": _MROPE, "vision_config": _NARROW},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "attention_layers": DROP},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "grounding-dino": {"encoder_ffn_dim": 112},
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": {**_HUNYUAN, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": _HUNYUAN_VL},
    "hunyuan_vl_text": _HUNYUAN_VL,
    "informer": _SERIES,
    "instructblip": {"image_token_index": 200},
    "instructblipvideo": {"video_token_index": 200},
    "internvl": {"image_seq_length": 4},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 0,
    },
    "kyutai_speech_to_text": {"ffn_dim": 80},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "llama4": {"vision_config": {"intermediate_size": 128}},
    "lw_detr": {"backbone_config": _WINDOWS},
    "lw_detr_vit": _WINDOWS,
    "mamba2": {"num_heads": 8},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32},
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32},
    "ministral": {"head_dim": 8},
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {"vision_output_dim": 160},
    },
    "mm-grounding-dino": {"encoder_ffn_dim": 112},
    "mobilebert": {
        "hidden_size": 64,
        "embedding_size": 32,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
    },
    "mobilevit": {"hidden_sizes": [16, 24, 32]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moshi": {"ffn_dim": 80},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemo_speechlm": {
        "text_config": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}
    },
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "omdet-turbo": {
        "start": {"use_timm_backbone": False, "backbone_config": {**_RESNET}},
        "backbone_config": _RESNET,
    },
    "paddleocr_vl": {"text_config": _MROPE},
    "paddleocr_vl_text": _MROPE,
    "perceiver": {"num_self_attends_per_block": 2, "d_latents": 32, "num_latents": 8},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 25, "class_order": list(range(25))},
    "qwen2_5_omni_thinker": {"text_config": _MROPE, "vision_start_token_id": 207},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_vl_text": _MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 207},
    "qwen3_omni_moe": {"talker_config": {"text_config": {"shared_expert_intermediate_size": 56}}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "intermediate_size": 80},
    "sam": {"prompt_encoder_config": {"image_embedding_size": 4}},
    "sam2": {"vision_config": {"backbone_config": _HIERA}},
    "sam2_hiera_det_model": _HIERA,
    "sam2_video": {"vision_config": {"backbone_config": _HIERA}},
    "sam2_vision_model": {"backbone_config": _HIERA},
    "sam_hq": {"prompt_encoder_config": {"image_embedding_size": 4}},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "seggpt": {"num_hidden_layers": 2, "merge_index": 0, "intermediate_hidden_state_indices": [1]},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 768}},
    "siglip2": {"vision_config": {"patch_size": 16}},
    "speecht5": {"vocab_size": 211},
    "shieldgemma2": {"yes_token_index": 100, "no_token_index": 101},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "table-transformer": _NO_TIMM,
    "time_series_transformer": _SERIES,
    "tvp": {"visual_prompt_size": 8},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "wav2vec2-bert": {"vocab_size": 211},
    "wav2vec2-conformer": {"vocab_size": 211},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "n_mamba_heads": 2},
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8, "mamba_headdim": 8},
}
"""Fields of configs, over what the rules make of the defaults. `start` goes to the config class first."""

_WIDE: dict[str, Any] = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 56}
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v3/sparse": {"first_k_dense_replace": 0},
    "deepseek_v3/wide": {"first_k_dense_replace": 0, "moe_intermediate_size": 48},
    "ernie4_5_moe/sparse": {"moe_layer_start_index": 0},
    "gemma4/experts": {"text_config": _GEMMA4_MOE},
    "glm4_moe/sparse": {"first_k_dense_replace": 0},
    "gpt2/inner": {"n_inner": 40},
    "kolibri1/wide": _WIDE,
    "llama/biases": {"mlp_bias": True, "attention_bias": True},
    "llama/relu2": {"hidden_act": "relu2"},
    "opt/post-norm": {"do_layer_norm_before": False},
    "qwen2_moe/sparse": {"mlp_only_layers": []},
    "qwen3_5_moe_text/wide": _WIDE,
    "qwen3_moe/sparse": {"mlp_only_layers": []},
    "qwen3_next/sparse": {"mlp_only_layers": []},
    "qwen3_next/wide": {"mlp_only_layers": [], **_WIDE},
    "solar_open/wide": {"moe_intermediate_size": 48},
    "step3p7/clamped": {
        "text_config": {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limits": [None, None, 1.5],
            "swiglu_limits_shared": [None, None, 1.5],
        }
    },
    "t5/gated": {"feed_forward_proj": "gated-gelu"},
}
"""Models of a type that its default config does not show: fields over those of `OVERRIDES`."""

_QFORMER = {"qformer_input_ids": ("ids", (2, 8), 150)}
INPUTS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"input_values": (2, 64, 16)},
    "blip_2_qformer": {"query_embeds": (2, 8, 32), "encoder_hidden_states": (2, 5, 32)},
    "clap": {"input_features": (2, 1, 1024, 64)},
    "decision_transformer": {
        "states": (2, 4, 17),
        "actions": (2, 4, 4),
        "rewards": (2, 4, 1),
        "returns_to_go": (2, 4, 1),
        "timesteps": ("ids", (2, 4), 8),
        "attention_mask": ("ones", (2, 4)),
    },
    "dia": {
        "input_ids": ("ids", (2, 8), 200),
        "decoder_input_ids": ("ids", (2, 4, 9), 60),
    },
    "fun_asr_nano_encoder": {
        "input_features": (2, 20, 112),
        "input_features_mask": ("ones", (2, 20)),
    },
    "idefics": {
        "pixel_values": (2, 1, 3, 32, 32),
        "image_attention_mask": ("ones", (2, 8, 1)),
    },
    "instructblip": _QFORMER,
    "instructblipvideo": _QFORMER,
    "kyutai_speech_to_text": {"input_ids": ("ids", (2, 8, 3), 60)},
    "lxmert": {
        "input_ids": ("ids", (2, 8), 200),
        "visual_feats": (2, 5, 32),
        "visual_pos": (2, 5, 4),
    },
    "mllama": {
        "input_ids": ("ids", (2, 8), 200),
        "pixel_values": (2, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": [[1], [1]],
        "aspect_ratio_mask": ("ones", (2, 1, 4)),
        "cross_attention_mask": ("ones", (2, 8, 1, 4)),
    },
    "muse_spark_audio": {"input_values": (2, 1920)},
    "musicgen": {"input_ids": ("ids", (2, 8), 200), "decoder_input_ids": ("ids", (4, 8), 60)},
    "musicgen_melody": {"input_ids": ("ids", (2, 8), 200), "decoder_input_ids": ("ids", (4, 8), 60)},
    "patchtsmixer": {"past_values": (2, 32, 1)},
    "patchtst": {"past_values": (2, 32, 1)},
    "pix2struct": {
        "flattened_patches": ("whole", (2, 16, 770), 4),
        "decoder_input_ids": ("ids", (2, 8), 200),
    },
    "qwen2_audio": {
        "input_ids": [[2, *[210] * 32, 50, 51]] * 2,
        "attention_mask": ("ones", (2, 35)),
        "input_features": (2, 16, 128),
        "feature_attention_mask": ("ones", (2, 128)),
    },
    "video_llama_3": {
        "input_ids": [[2, *[210] * 16, 50, 51]] * 2,
        "attention_mask": ("ones", (2, 19)),
        "pixel_values": (32, 192),
        "image_grid_thw": [[1, 4, 4]] * 2,
        "image_merge_sizes": [1, 1],
    },
    "video_llama_3_vision": {
        "pixel_values": (32, 192),
        "grid_thw": [[1, 4, 4], [1, 4, 4]],
        "merge_sizes": [1, 1],
    },
}
"""Inputs that are not guessed: see `inputs.py`."""

OWN_PICTURES = ("pix2struct", "siglip2_vision_model", "timesformer", "videomae")
"""Models that read pictures in a form that only their own processor makes: patches, frames."""

FFNS: dict[str, tuple[str, ...]] = {
    "*": (r"memory_attention\.layers\.\d+\.", r"gated_cross_attn_layers\.\d+\.mlp"),
}
"""FFNs below a module that by its name has none: patterns of down projections, by model type or for all."""
NOT_FFNS: dict[str, tuple[str, ...]] = {
    "axk2": (r"layernorm\.mlp",),
    "*": (r"ada_rms_norm\.linear", r"query_scale\."),
}
"""What has an FFN's shape and names and is none: norms conditioned on their input."""
OPTIONAL_FFNS: dict[str, tuple[str, ...]] = {
    "*": (
        r"head\.mlp\.fc2",
        r"projectors?\.(?:\d+\.)?qformer\.encoder\.layer\.\d+\.",
        r"resampler\.layers\.\d+\.",
        r"(?:diffusion|flow)_head\.layers\.\d+\.",
        r"pooler\.self_attention_layers\.\d+\.mlp",
        r"pooler\.cross_attention_layer\.mlp",
        r"object_pointer_proj",
        r"pwconv2|pointwise_conv2",
    ),
    "groupvit": (r"downsample\.",),
    "perceiver": (r"(?:encoder|decoder)\.\w*cross_attention\.mlp",),
    "patchtsmixer": (r"patch_mixer",),
    "rwkv": (r"feed_forward",),
}
"""Blocks of heads, poolers and resamplers, mixers of positions, ConvNeXt's: a tool may take them or not."""
