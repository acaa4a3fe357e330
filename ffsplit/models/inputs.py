"""What a model reads and makes: by the arguments of its forward, and its family's tasks in transformers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ffsplit.errors import UnsupportedModelError
from ffsplit.models.family import TEXT, Architecture, Makes, Media, Medium
from ffsplit.models.names import main_inputs

GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Class name endings of models that predict the next token."""
DECODERS = (*GENERATORS, "MTModel", "EncoderDecoderModel", "ForSpeechToText")
"""Class name endings of encoder-decoders that return the logits of their target's tokens."""
CLASSIFIERS = tuple(f"For{each}Classification" for each in ("Sequence", "Image", "Audio", "Video"))
"""Class name endings of models whose head returns the logits of a whole row."""

MEDIUM_OF: dict[str, Medium] = {
    "input_ids": "text",
    "pixel_values": "image",
    "flattened_patches": "image",
    "pixel_values_videos": "video",
    "input_values": "sound",
    "input_features": "sound",
}
"""The media that arguments of a model are made from."""


class Use(NamedTuple):
    """What a model is for: see the fields of `Architecture`."""

    reads: Media
    may_read: Media
    makes: Makes


def use_of(model: Any, base: Any, config: Mapping[str, Any]) -> Use:
    """What a model reads and makes, by the arguments of its forward and its family's tasks."""
    makes, takes = _makes(model, base, config), _taken(model) or _taken(base)
    mains = [MEDIUM_OF[name] for name in main_inputs(base) if name in MEDIUM_OF]
    main = next((medium for medium in mains if medium in takes), takes[0] if takes else None)
    if main is None:
        needed = needed_arguments(inspect.signature(model.forward).parameters)
        raise unreadable(model.config, needed or main_inputs(base))
    others = tuple(medium for medium in takes if medium not in ("text", "video"))
    if _reads_videos(base, config):
        return Use(("video",), (), makes)
    if main == "text" and makes != "embeddings":
        return Use(TEXT, others, makes)
    medium = others[0] if main == "text" and others else main
    has_text = "text" in takes or makes == "target"
    return Use((medium, *TEXT) if has_text and medium != "text" else (medium,), (), makes)


def needed_arguments(arguments: Mapping[str, inspect.Parameter]) -> list[str]:
    """Those of a forward's arguments that it cannot do without."""
    named = [(name, each) for name, each in arguments.items() if each.kind == each.POSITIONAL_OR_KEYWORD]
    return [name for name, each in named if each.default is each.empty and name != "self"]


def unreadable(config: Any, names: Sequence[str]) -> UnsupportedModelError:
    """The error for a model that needs arguments which no row gives: most often it is a part of another."""
    named, advice = " and ".join(dict.fromkeys(names[:3])), part_of(config)
    return UnsupportedModelError(
        f"{config.model_type} reads {named}, which no row of text, pictures, sound or videos gives"
        + (f"; {advice}" if advice else "")
    )


def _taken(model: Any) -> Media:
    """The media that the arguments of a model's forward are made from, text first."""
    names = inspect.signature(model.forward).parameters
    return tuple(dict.fromkeys(medium for name, medium in MEDIUM_OF.items() if name in names))


def _reads_videos(base: Any, config: Mapping[str, Any]) -> bool:
    from transformers.models.auto import modeling_auto as auto

    classifies = str(config["model_type"]) in auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES
    return classifies or main_inputs(base)[0] == "pixel_values_videos"


def _makes(model: Any, base: Any, config: Mapping[str, Any]) -> Makes:
    """What a model makes, which is what is compared."""
    from transformers.models.auto import modeling_auto as auto

    family, (name, *_) = str(config["model_type"]), config.get("architectures") or [""]
    names = inspect.signature(model.forward).parameters
    if config.get("is_encoder_decoder") and "decoder_input_ids" in names:
        return "target"
    named = str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    if not named and hasattr(base, "get_text_features"):
        return "embeddings"
    if "text" not in _taken(base):
        return "states"
    causal = family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        family in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )
    masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "next_tokens" if named or config.get("is_decoder") or (causal and not masked) else "states"


_WORDS: dict[Medium, str] = {"text": "text", "image": "pictures", "sound": "sound", "video": "videos"}


def media_in_words(media: Media) -> str:
    """As in `pictures and text`; `text alone` for one medium."""
    words = [_WORDS[each] for each in media]
    return " and ".join(words) if words[1:] else f"{words[0]} alone"


def richer_rows(architecture: Architecture, given: Media) -> str:
    """Advice for a model that fails on the least that its family reads; empty if it reads no more."""
    if given != architecture.reads or not architecture.may_read:
        return ""
    medium, *_ = architecture.may_read
    words = media_in_words((medium, *given))
    return f"give it {words}: --calibration FILE.parquet#{medium},text, or a folder with a captions.jsonl"


def part_of(config: Any) -> str:
    """Advice for a part of a larger model, in the same file of transformers; empty if it is none."""
    own = type(config)
    for found in vars(sys.modules[own.__module__]).values():
        parts = getattr(found, "sub_configs", None)
        whole = getattr(found, "model_type", "")
        if isinstance(parts, dict) and own in parts.values() and whole:
            return f"compress the {whole} that it is a part of, with --only for its FFNs"
    return ""
