"""A checkpoint of Llama-7B's shape with random weights, as large as a real one."""

from __future__ import annotations

import json
import math
from pathlib import Path

VOCABULARY = 32000
POOL_SIZE = 10_000_019
"""Random numbers that all weights are cut from; drawing 6.7 billion would take longer than the rest."""
INDEX_NAME = "model.safetensors.index.json"


def write_checkpoint(directory: Path, *, num_layers: int) -> None:
    """bf16 weights of standard deviation 0.02, a file a layer, one layer in memory at a time.

    What is there already is taken as it is: the index is written last.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if (directory / INDEX_NAME).exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"num_hidden_layers": num_layers, "vocab_size": VOCABULARY, "dtype": "bfloat16"}
    config = LlamaConfig(architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(directory)
    write_tokenizer(directory)
    parts = shapes(config.hidden_size, config.intermediate_size, num_layers=num_layers)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    pool = torch.empty(POOL_SIZE, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, shape in part.items():
            start = int(torch.randint(POOL_SIZE, (), generator=generator))
            values = pool.roll(start).repeat(-(-math.prod(shape) // POOL_SIZE))[: math.prod(shape)]
            tensors[name] = torch.ones(shape, dtype=pool.dtype) if len(shape) == 1 else values.view(shape)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shapes(width: int, inner: int, *, num_layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file: a block each, and what lies outside the blocks."""
    attention = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    ffn = {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    norms = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    block = attention | ffn | {"mlp.down_proj.weight": (width, inner)} | norms
    table = (VOCABULARY, width)
    return [
        *({f"model.layers.{layer}.{name}": block[name] for name in block} for layer in range(num_layers)),
        {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (width,)},
    ]


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of the text that calibration reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ffsplit.calibration.sources import read_all

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(read_all(("builtin:pydoc",)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)
