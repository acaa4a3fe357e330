"""Checkpoints of large models' shapes: true headers over sparse files, so they take no room."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.tiny_models import save_tokenizer

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def save_llama_shape(directory: Path, *, max_shard_bytes: int = 5 * 10**9, **sizes: int) -> Path:
    """A Llama in bf16 whose weights are holes in its files."""
    directory.mkdir(parents=True)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config | sizes))
    save_tokenizer(directory)
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    narrow = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(sizes["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    tensors |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        if filled + 2 * math.prod(shape) > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * math.prod(shape)
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_holes(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory


def _write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        offsets = [position, position + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
