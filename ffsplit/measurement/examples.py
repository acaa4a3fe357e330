"""Random inputs of any model, to time it with: what its forward takes says what it reads."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor


def example_inputs(
    model: Any, *, num_rows: int, num_tokens: int, vocab_size: int | None = None
) -> dict[str, Tensor]:
    """Arguments of a forward pass: token ids of `num_tokens` a row, and pictures or sounds.

    Pictures have the size the model is made for; a sound has as many samples as come to `num_tokens`
    frames, or what an encoder of fixed length takes. Where pictures stand among the tokens there are
    none. The same arguments give the same inputs.
    """
    names = _argument_names(model)
    generator = torch.Generator().manual_seed(0)
    config, inputs = model.config, {}

    def floats(*shape: int) -> Tensor:
        return torch.randn(num_rows, *shape, generator=generator)

    if "input_ids" in names:
        size = vocab_size or vocab_size_of(model)
        inputs["input_ids"] = torch.randint(size, (num_rows, num_tokens), generator=generator)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "pixel_values" in names and not hasattr(config, "image_token_id"):
        vision = getattr(config, "vision_config", config)
        sizes = vision.image_size
        height, width = sizes if isinstance(sizes, list | tuple) else (sizes, sizes)
        inputs["pixel_values"] = floats(vision.num_channels, height, width)
    if "input_values" in names:
        inputs["input_values"] = floats(_num_samples(config, num_frames=num_tokens))
    if "input_features" in names:
        inputs["input_features"] = floats(config.num_mel_bins, 2 * config.max_source_positions)
    if "decoder_input_ids" in names:
        shape = (num_rows, num_tokens)
        inputs["decoder_input_ids"] = torch.randint(vocab_size_of(model), shape, generator=generator)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
        if name in names
    }


def _argument_names(model: Any) -> set[str]:
    """What a model's forward takes. One that hands all its arguments on takes what its family reads first."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        names.add(model.main_input_name)
        names |= {"attention_mask"} if "input_ids" in names else set()
    return names


def vocab_size_of(model: Any) -> int:
    """How many tokens a model's text side knows; 0 where it has none."""
    text = getattr(model.config, "text_config", model.config)
    return int(getattr(text, "vocab_size", 0) or 0)


def _num_samples(config: Any, *, num_frames: int) -> int:
    """Samples that the convolutions turn into `num_frames` frames, or a few more."""
    hop = math.prod(map(int, config.conv_stride))
    return hop * (num_frames + sum(map(int, config.conv_kernel)))
