"""Processors of texts with pictures or sounds, of the real classes, for tiny models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ffsplit.compat.transformers import pictures_alone
from tests.tiny_models import save_tokenizer

_LITERAL = re.compile(r"""["'](<[^<>"'\s/{}]+>|\[[A-Z_]+\])["']""")
_OF_TOKENIZER = re.compile(r"tokenizer\.(\w+_token)\b")
_USUAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_ALIASES = {
    "merge_size": "spatial_merge_size",
    "spatial_merge_size": "merge_size",
    "image_seq_length": "mm_tokens_per_image",
    "image_seq_len": "image_seq_len",
    "max_image_size": "image_size",
}

_OF_CLIP = {"num_additional_image_tokens": 1}
"""What LLaVA's processors must know of a CLIP vision tower: it has a class token."""


def save_processor(directory: Path, model: Any, *, extractor: Any = None, chat_template: str = "") -> bool:
    """The joint processor of a model's family, with a tokenizer that has its tokens, at its config's ids.

    False, and nothing is saved, for families without one.
    """
    name = PROCESSOR_MAPPING_NAMES.get(model.config.model_type)
    if name is None:
        return False
    cls = getattr(transformers, name)
    ids = _ids_by_name(model.config)
    tokens = _tokens_of(cls)
    with pictures_alone():
        processor = _made(cls, directory, model.config, tokens, ids, extractor)
        for medium in ("image", "video", "audio"):
            token = str(getattr(processor, f"{medium}_token", "") or "")
            if token and medium in ids:
                tokens = {token: medium} | {each: name for each, name in tokens.items() if name != medium}
        processor = _made(cls, directory, model.config, tokens, ids, extractor)
        if chat_template:
            processor.chat_template = chat_template
        processor.save_pretrained(directory)
    return True


def _tokens_of(cls: Any) -> dict[str, str]:
    """The special tokens that a processor's code names, and the names that it calls them by."""
    source = "".join(inspect.getsource(each) for each in cls.__mro__ if each.__name__ == cls.__name__)
    names = {each.removesuffix("_token") for each in _OF_TOKENIZER.findall(source)}
    names |= {"image"} if re.search(r"image_token", source) else set()
    tokens = {f"<{name}>": name for name in sorted(names) if f"{name}_token" not in _USUAL}
    for literal in _LITERAL.findall(source):
        tokens.setdefault(literal, re.sub(r"\W+", "", literal))
    return tokens


def _ids_by_name(config: Any) -> dict[str, int]:
    """The ids of special tokens that a config states, by their names."""
    found: dict[str, int] = {}
    for part in _parts(config):
        for field, value in part.items():
            match = re.fullmatch(r"(\w+?)_token_(?:id|index)", field)
            if match and isinstance(value, int) and f"{match[1]}_token" not in _USUAL:
                found.setdefault(match[1], value)
    return found


def _parts(config: Any) -> Iterator[Mapping[str, Any]]:
    """A config's fields, then those of its parts."""
    yield vars(config)
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield vars(value)


def _stated(config: Any, name: str) -> Any:
    for part in _parts(config):
        for each in (name, _ALIASES.get(name, name)):
            if part.get(each) is not None:
                return part[each]
    return None


def _made(
    cls: Any, directory: Path, config: Any, tokens: Mapping[str, str], ids: Mapping[str, int], extractor: Any
) -> Any:
    tokenizer = save_tokenizer(directory, special=_numbered(tokens, ids))
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "image_processor":
            given[name] = picture_processor(config)
        elif name == "tokenizer" or name.endswith("_tokenizer"):
            given[name] = tokenizer
        elif name in ("feature_extractor", "audio_processor"):
            given[name] = extractor
        elif name == "video_processor":
            given[name] = _videos().from_pretrained(directory)
        elif name not in ("self", "args", "kwargs", "chat_template", "image_token", "video_token"):
            stated = _OF_CLIP.get(name, _stated(config, name))
            if stated is not None:
                given[name] = stated
            elif parameter.default is parameter.empty:
                given[name] = 1
    return cls(**given)


def _videos() -> Any:
    return import_module("transformers.models.auto.video_processing_auto").AutoVideoProcessor


def _numbered(tokens: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, int]:
    """An id for each token: the config's, or the next one below the vocabulary's end."""
    taken = set(ids.values())
    free = (number for number in range(199, 150, -1) if number not in taken)
    found: dict[str, int] = {}
    for token, name in tokens.items():
        number = ids.get(name)
        found[token] = next(free) if number is None or number in found.values() else number
    return found


def picture_processor(config: Any) -> Any:
    """A family's image processor of the Pillow kind, for pictures as small as the model's."""
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type)
    name = "ViTImageProcessorPil" if backends is None else backends.get("pil")
    if name is None:
        raise ValueError(f"{config.model_type} has no image processor without torchvision")
    cls = getattr(transformers, name)
    side = _side(config)
    given: dict[str, Any] = {}
    for field in ("size", "crop_size"):
        default = getattr(cls, field, None)
        if default is not None:
            given[field] = _small(default, side)
    for field in dir(cls):
        if not field.startswith("_") and field not in (*given, "num_channels", "model_type", "image_size"):
            stated = _stated(config, field)
            if stated is not None and not callable(getattr(cls, field)):
                given[field] = stated
    return cls(**given)


def _small(default: Any, side: int) -> Any:
    keys = dict(default) if isinstance(default, Mapping) else {}
    if set(keys) == {"shortest_edge", "longest_edge"} and keys["longest_edge"] > 100_000:  # pixels
        return {"shortest_edge": side * side // 4, "longest_edge": side * side}
    return dict.fromkeys(keys, side) if keys else side


def _side(config: Any) -> int:
    for part in _parts(config):
        size = part.get("image_size")
        size = size[0] if isinstance(size, list | tuple) else size
        if isinstance(size, int):
            return size
    return 32
