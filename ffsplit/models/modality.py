"""What a model and its towers read: text, pictures or sound."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ffsplit.errors import UnsupportedModelError
from ffsplit.models.family import ModelKind, Reads
from ffsplit.models.names import main_inputs
from ffsplit.models.structure import Modules

_SOUND_OR_PICTURE: tuple[tuple[str, Reads], ...] = (
    (r"vision|visual|image|picture|video|vit|pixel|projector|q_?former|resampler|perceiver", "image"),
    (r"audio|speech|sound|acoustic", "sound"),
)


def parents_of(block: str, modules: Modules) -> Iterator[tuple[str, Any]]:
    """The modules around a block, from the inside, that are models with a config of their own."""
    parts = block.split(".")
    for length in reversed(range(len(parts))):
        path = ".".join(parts[:length])
        if hasattr(modules[path], "config") and hasattr(modules[path], "main_input_name"):
            yield path, modules[path]


def reads_of(base: Any, modules: Modules, block: str) -> Reads:
    """What the tokens of a tower are made from."""
    for path, owner in parents_of(block, modules):
        if named := modality_named(path):
            return named
        return _MAIN_INPUTS.get(main_inputs(owner)[0], "text")
    return "text"


def modality_named(path: str) -> Reads | None:
    """What a module reads that is named after it, other than text: vision_tower, or vision_moe in a block."""
    return next((reads for pattern, reads in _SOUND_OR_PICTURE if re.search(pattern, path.lower())), None)


_MAIN_INPUTS: dict[str, Reads] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "sound",
    "input_features": "sound",
}


def kind_of(base: Any, config: Mapping[str, Any]) -> ModelKind:
    """What a model reads, and which of its outputs are compared."""
    from transformers.models.auto import modeling_auto as auto

    main, *_ = main_inputs(base)
    reads = _MAIN_INPUTS.get(main)
    family, (name, *_) = str(config["model_type"]), config.get("architectures") or [""]
    if config.get("is_encoder_decoder") and "decoder_input_ids" in inspect.signature(base.forward).parameters:
        kind = {"text": "seq2seq", "sound": "speech"}.get(reads or "")
    elif hasattr(base, "get_text_features") and hasattr(base, "get_image_features"):
        kind = "image_text"
    elif reads != "text":
        kind = {"image": "image", "sound": "audio"}.get(reads or "")
    else:
        named = str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        causal = family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
            family in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        )
        masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        kind = "causal_lm" if named or config.get("is_decoder") or (causal and not masked) else "encoder"
    if kind is None:
        made = f"makes text of {main}" if reads else f"reads {main}"
        raise UnsupportedModelError(
            f"{family} is not in the table of architectures, and it {made}: FFSplit calibrates models that "
            "read text, pictures or sound, and those that make text of text or of sound"
        )
    return cast(ModelKind, kind)
