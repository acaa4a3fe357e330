"""Other tools that give a decoder's FFNs few bits, each as a function from a model to a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Peer = Callable[[Any, Any, Tensor], tuple[Any, float]]
FFN = r"re:.*mlp\.(gate|up|down)_proj$"


def bits_per_weight(group_size: int, *, zero_bits: int) -> float:
    """With a 16-bit scale per group."""
    return 4 + (16 + zero_bits) / group_size


def torchao_int4(
    model: Any, tokenizer: Any, rows: Tensor, *, group_size: int, symmetric: bool
) -> tuple[Any, float]:
    """Rounded to nearest, with torchao's own choice of scales and, if not `symmetric`, zero points."""
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(group_size), mapping_type=mapping
    )
    ao.quantize_(
        model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "mlp" in name
    )
    return model, bits_per_weight(group_size, zero_bits=0 if symmetric else 8) / 16


def llm_compressor(
    model: Any, tokenizer: Any, rows: Tensor, *, group_size: int, symmetric: bool
) -> tuple[Any, float]:
    """Its GPTQ, W4A16, with activation order within static groups, which is its default."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from torch.utils.data import DataLoader

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group"}
    weights |= {"group_size": group_size}
    group = {"targets": [FFN], "weights": weights}
    modifier = GPTQModifier(config_groups={"ffns": group}, ignore=["lm_head"])
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    oneshot(model=model, dataset=data, recipe=modifier, num_calibration_samples=len(rows))
    return model, bits_per_weight(group_size, zero_bits=0 if symmetric else 4) / 16


def auto_round(
    model: Any, tokenizer: Any, rows: Tensor, *, group_size: int, symmetric: bool
) -> tuple[Any, float]:
    """Its signed gradient descent on the rounding of one block after the other."""
    from auto_round import AutoRound

    others = {
        name: {"bits": 16}
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "mlp" not in name
    }
    rounder = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=group_size,
        sym=symmetric,
        layer_config=others,
        dataset=list(rows[:, None]),
        seqlen=rows.shape[1],
        nsamples=len(rows),
        iters=200,
    )
    rounder.quantize()
    return rounder.model, bits_per_weight(group_size, zero_bits=0 if symmetric else 4) / 16


PEERS: dict[str, Peer] = {
    "torchao int4, groups of 64": partial(torchao_int4, group_size=64, symmetric=True),
    "torchao int4, groups of 64, zero points": partial(torchao_int4, group_size=64, symmetric=False),
    "torchao int4, groups of 32": partial(torchao_int4, group_size=32, symmetric=True),
    "llm-compressor GPTQ, groups of 64": partial(llm_compressor, group_size=64, symmetric=True),
    "llm-compressor GPTQ, groups of 32": partial(llm_compressor, group_size=32, symmetric=True),
    "llm-compressor GPTQ, groups of 64, zero points": partial(llm_compressor, group_size=64, symmetric=False),
    "AutoRound, groups of 64": partial(auto_round, group_size=64, symmetric=True),
    "AutoRound, groups of 32": partial(auto_round, group_size=32, symmetric=True),
}
