"""Small configs of every model family, from the defaults of its config class.

Rules by field name shrink every size, in nested configs too. FFN widths differ per field, so a width tells
which field states it. Layers are as few as show every kind of block that the default config has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import transformers

from benchmarks.families.tables import OVERRIDES, VARIANTS

HIDDEN = 32
VOCABULARY = 211
IMAGE = 32
WIDE = tuple(width for width in range(40, 1000, 8) if width not in (64, 96, 128))
NARROW = (24, 16, *range(48, 1000, 16))
"""FFN widths. Experts are often narrower than the hidden size; other widths are not.

Half of each is a multiple of four: transformers' products of stacked experts need multiples of 16 bytes.
"""
_DERIVED = (
    "per_layer_config",
    "num_feat_extract_layers",
    "stage_names",
    "id2label",
    "label2id",
    "num_labels",
    "label_names",
)
_STAGES = ("out_features", "out_indices")


class _Shrinker:
    """Shrinks one model's config. Widths and token ids are unique within it."""

    def __init__(self) -> None:
        self._widths: dict[tuple[str, str, int], int] = {}
        self._ids: dict[int, int] = {}
        self._pool = iter(WIDE)
        self._narrow_pool = iter(NARROW)

    def width(self, path: str, name: str, default: int) -> int:
        """A width of its own for each field."""
        key = (path, name, default)
        if key not in self._widths:
            pool = self._narrow_pool if re.search("moe|expert", name) else self._pool
            self._widths[key] = next(pool)
        return self._widths[key]

    def token(self, default: int) -> int:
        """The same token for the same token, within the vocabulary."""
        if default < 100:
            return default
        return self._ids.setdefault(default, VOCABULARY - 1 - len(self._ids) % 100)

    def shrink(self, fields: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        """The same config, small."""
        if not all(isinstance(name, str) for name in fields):
            return dict(fields)
        known = _init_fields(fields.get("model_type", ""))
        kept = {name: value for name, value in fields.items() if name not in _DERIVED}
        if known:
            kept = {name: value for name, value in kept.items() if name in known or name == "model_type"}
        small = _layers(kept)
        fewer = tuple(small)
        for name, value in kept.items():
            if name in small or (name in _STAGES and any(each in small for each in ("out_indices", "depth"))):
                continue
            if name == "out_indices" and "out_features" in kept:
                continue
            if name in _STAGES and any(LAYERS.search(each) for each in fewer):
                continue
            inner = f"{path}.{name}" if path else name
            if isinstance(value, Mapping):
                small[name] = self._rope(value) if "rope" in name else self.shrink(value, inner)
            elif isinstance(value, bool) or value is None or isinstance(value, str):
                small[name] = value
            elif isinstance(value, int | float):
                small[name] = self._number(name, value, path, kept)
            elif isinstance(value, list | tuple):
                small[name] = self._list(name, list(value), path, kept)
            else:
                small[name] = value
        return small

    def _rope(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        small = {
            name: self._rope(value) if isinstance(value, Mapping) else value for name, value in fields.items()
        }
        if "mrope_section" in small:
            small["mrope_section"] = [2, 1, 1]
        return small

    def _number(self, name: str, value: Any, path: str, all_fields: Mapping[str, Any]) -> Any:
        if isinstance(value, float):
            return value
        if re.search(r"(?:_token_id|_token_index|(?<!per)_token)$|^(?:bo|eo|pad).*_(?:id|index)$", name):
            return self.token(value)
        if WIDTHS.search(name) and value > 16:
            return self.width(path, name, value)
        if "depths" in all_fields and "window_size" in all_fields and name in ("image_size", "window_size"):
            return {"image_size": 2 * IMAGE, "window_size": 2}[name]
        if name == "window_size" and "spatial_merge_size" in all_fields:
            return IMAGE
        if name == "embed_dim" and isinstance(all_fields.get("num_heads"), list | tuple):
            return 8 * all_fields["num_heads"][0]
        for pattern, small in RULES:
            if pattern.search(name):
                return min(value, small) if isinstance(small, int) else small(value, all_fields)
        return value

    def _list(self, name: str, value: list[Any], path: str, all_fields: Mapping[str, Any]) -> list[Any]:
        if name in LISTS:
            return list(LISTS[name])
        if all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            if WIDTHS.search(name):
                return [self.width(path, name, each) for each in value]
            if re.search(r"token_id", name):
                return [self.token(each) for each in value]
            if CHANNELS.search(name):
                return [_channels(each) for each in value]
            if re.search(r"^depths?$|num_block_repeats|num_layers|blocks_per_stage|layers_per", name):
                return [min(each, 2 if index == 0 else 1) for index, each in enumerate(value)]
            if re.search(r"image_size|img_size", name):
                return [IMAGE for _ in value]
            if re.search(r"^patch_size$", name) and max(value) > 8:
                return [8 for _ in value]
        return value


def _channels(value: int) -> int:
    return value if value <= 16 else max(8, value // 8)


def _init_fields(model_type: str) -> set[str]:
    """The fields that a config class takes; empty if it does not say."""
    cls = transformers.CONFIG_MAPPING.get(model_type, None)
    if cls is None or not dataclasses.is_dataclass(cls):
        return set()
    names = {field.name for field in dataclasses.fields(cls)}
    return names | {*cls.attribute_map} | {*_STAGES}


LAYERS = re.compile(
    r"^(?:num_hidden_layers|n_layers?|num_layers|depth|layers|num_blocks|\w*_layers|\w*num_hidden_layers|"
    r"\w*_depth|num_\w*layers)$"
)
NO_LAYERS = re.compile(
    r"shared|window|predict|adapter|feat_extract|lstm|residual|query|dense|conv|mtp|postnet"
)


def _layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of layers, and lists with an item per layer, so that each kind of layer occurs."""
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if not LAYERS.search(name) or NO_LAYERS.search(name) or isinstance(value, bool):
            continue
        if not isinstance(value, int) or value < 2:
            continue
        lists = {
            key: each
            for key, each in fields.items()
            if isinstance(each, list | tuple)
            and len(each) == value
            and not isinstance(each[0], list)
            and (value > 4 or "layer" in key)
            and key not in ("conv_dim", "conv_stride", "conv_kernel")
        }
        indices = {
            key: each
            for key, each in fields.items()
            if isinstance(each, list | tuple)
            and key not in lists
            and each
            and re.search(r"ind(?:ex|ic)es$|idxs$|_blocks$|attn_layers$|_indexes$|layer_ids$", key)
            and all(isinstance(number, int) for number in each)
        }
        combinations: dict[str, int] = {}
        for index in range(value):
            combinations.setdefault(str([each[index] for each in lists.values()]), index)
        chosen = sorted(combinations.values())[:6]
        number = max(len(chosen), 2, *(min(len(each), 4) for each in indices.values()), 0)
        if fields.get("first_k_dense_replace") or fields.get("mlp_only_layers") is not None:
            number = max(number, 3)
        chosen += [index for index in range(value) if index not in chosen][: number - len(chosen)]
        chosen.sort()
        small[name] = len(chosen)
        for key, each in lists.items():
            if len(fields[key]) == value and key not in small:
                small[key] = [each[index] for index in chosen]
                if WIDTHS.search(key):
                    small[key] = [40 + 8 * (index % 2) for index in range(len(chosen))]
        for key, each in indices.items():
            offset = 1 if key == "out_indices" else 0
            few = min(len(each), number)
            small[key] = [number - few + index + offset for index in range(few)]
    if "mlp_only_layers" in fields and "mlp_only_layers" not in small:
        small["mlp_only_layers"] = [0]
    return small


def _heads(value: int, fields: Mapping[str, Any]) -> int:
    return min(value, 4)


def _kv_heads(value: int, fields: Mapping[str, Any]) -> int:
    heads = {
        number
        for name, number in fields.items()
        if re.search(r"heads?$", name) and not re.search("k(?:ey_)?v", name)
    }
    return min(value, 4 if value in heads or not heads else 2)


def _head_dim(value: int, fields: Mapping[str, Any]) -> int:
    if fields.get("qk_rope_head_dim") == value and "qk_nope_head_dim" in fields:
        return 4
    return 8


def _patch(value: int, fields: Mapping[str, Any]) -> int:
    return value if value <= 4 else 8


WIDTHS = re.compile(
    r"intermediate_(?:size|dim)|ffn_dim|ffn_hidden_size|^n_inner$|^d_?ff$|^d_inner$|mlp_dim|linear_units|"
    r"feed_?forward_(?:hidden_size|dim|size|proj_dim)|dim_feedforward|^ffn_size|inner_dim$|_ff_dim|mlp_hidden|"
    r"_ffn_inner|mlp_size|ff_size|dim_ff$|ffn_intermediate"
)
CHANNELS = re.compile(
    r"channels|_dims?$|hidden_sizes|embed_dims?$|sizes$|widths|dim_per_stage|channel_list|^dims$"
)
LISTS: dict[str, list[Any]] = {
    "conv_dim": [32, 32],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "tdnn_dim": [32, 32],
    "tdnn_kernel": [5, 3],
    "tdnn_dilation": [1, 2],
    "mrope_section": [2, 1, 1],
    "image_grid_pinpoints": [[IMAGE, IMAGE]],
    "vision_feature_layers": [-2, -1],
}
RULES: tuple[tuple[re.Pattern[str], Any], ...] = tuple(
    (re.compile(pattern), small)
    for pattern, small in (
        (r"^max_window_layers$", 2),
        (r"num_(?:codevectors|codebooks|quantizers)|n_codebooks", 2),
        (r"codebook_size", 64),
        (r"type_vocab", 2),
        (r"vocab_size|^n_vocab|vocabulary|n_token|byte_group_vocab", VOCABULARY),
        (r"num_filters", 4),
        (r"num_frames", 4),
        (r"latent_query_num", 8),
        (r"mm_tokens_per_image", 4),
        (r"upsample_initial_channel", 64),
        (r"^n_groups$|mamba_n_?groups", 2),
        (r"max_2d_position", 256),
        (r"max_(?:source|target)_positions", 64),
        (r"max_position|n_positions|n_ctx|max_seq_len|max_sequence|context_length", 128),
        (r"q_lora_rank", 24),
        (r"kv_lora_rank", 16),
        (r"qk_rope_head_dim", 4),
        (r"qk_nope_head_dim", 8),
        (r"qk_head_dim", 12),
        (r"v_head_dim", 8),
        (r"first_k_dense_replace", 1),
        (r"experts?_(?:per|top)|top_?k|moe_k$|topk", lambda value, fields: min(value, 2)),
        (r"shared_experts?$", 2),
        (r"expert_group|n_group$", 2),
        (r"num_\w*experts|n_routed_experts|^n_experts|experts$", 4),
        (r"(?:key_value|kv)_heads", _kv_heads),
        (r"linear_num_key_heads", 2),
        (r"linear_num_value_heads", 4),
        (r"linear_(?:key|value)_head_dim", 8),
        (
            r"(?:^|_)head_dim$|^d_kv$|^d_head$|^dim_head$|head_size$|^kv_channels$|head_channels|mamba_d_head",
            _head_dim,
        ),
        (r"index_n_heads", 2),
        (r"heads?$|attention_heads|n_head|num_head|^attention_heads", _heads),
        (r"sliding_window|local_attention|attention_window|window_length", 16),
        (r"window_size", 4),
        (r"image_size|img_size|input_size$|input_resolution", IMAGE),
        (r"^patch_size$|encoder_stride|patch_stride", _patch),
        (r"num_mel_bins|n_mels|feature_size", 16),
        (r"^rotary_dim$", 4),
        (r"num_pos_feats", HIDDEN // 2),
        (r"upsample_groups", HIDDEN),
        (r"num_conv_pos_embeddings", 4),
        (r"num_conv_pos_embedding_groups", 2),
        (r"state_size|d_state", 8),
        (r"chunk_size", 16),
        (r"time_step_rank|dt_rank", 4),
        (r"num_(?:queries|query_tokens|latents|denoising)|n_latents|image_seq_len", 8),
        (r"num_register_tokens", 2),
        (r"word_embed_proj_dim", HIDDEN),
        (
            r"hidden_size$|hidden_dim$|^d_model$|^n_embd$|^dim$|embed_?dim$|embedding_?dim$|embedding_size|"
            r"embed_size|projection_(?:dim|size)|proj_dim|output_dim|output_size|_hidden_size|^width$|_width$|"
            r"hidden_channels|^hidden$|_dim$|hidden_dimension|_channels$|_features$|^hidden_units|units$",
            HIDDEN,
        ),
    )
)
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}


def tiny_config(model_type: str) -> Any:
    """A small config of a family, or of a variant of one."""
    variant = VARIANTS.get(model_type, {})
    model_type = model_type.partition("/")[0]
    cls = transformers.CONFIG_MAPPING[model_type]
    given = OVERRIDES.get(model_type, {})
    start = dict(given.get("start", {}))
    default = cls(**start).to_dict()
    base = transformers.PretrainedConfig().to_dict()
    fields = {name: value for name, value in default.items() if name not in base or value != base[name]}
    fields = {
        name: value
        for name, value in fields.items()
        if name not in ("architectures", "transformers_version", "dtype", "_name_or_path")
    }
    small = _Shrinker().shrink({**fields, "model_type": model_type})
    small.pop("model_type", None)
    small = _merge(small, {name: value for name, value in given.items() if name != "start"})
    return cls(**_merge(small, variant))


def _merge(fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `fields`, part by part; DROP removes a field."""
    for name, value in given.items():
        if value == "DROP":
            fields.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(fields.get(name), dict):
            fields[name] = _merge(dict(fields[name]), value)
        else:
            fields[name] = value
    return fields
