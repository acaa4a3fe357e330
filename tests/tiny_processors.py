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
_OF_TOKENIZER = re.compile(r"""tokenizer(?:\.|, ")((?!add_)\w+_token)(?:_id)?\b""")
_USUAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_ALIASES = {
    "merge_size": "spatial_merge_size",
    "spatial_merge_size": "merge_size",
    "image_seq_length": "mm_tokens_per_image",
    "image_seq_len": "image_seq_len",
    "img_size": "image_size",
}

_GIVEN = {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
"""What LLaVA's processors must know of a CLIP vision tower: its class token is left out."""

_PLACES = {"florence2": 2}
"""Places of a picture in a text, where other rules than patches give them."""


def save_processor(directory: Path, model: Any, *, extractor: Any = None, chat_template: str = "") -> bool:
    """The joint processor of a model's family, with a tokenizer that has its tokens, at its config's ids.

    False, and nothing is saved, for families without one.
    """
    name = PROCESSOR_MAPPING_NAMES.get(model.config.model_type)
    if name is None:
        return False
    cls = getattr(transformers, name)
    with pictures_alone():
        try:
            processor = _with_ids(cls, directory, model.config, extractor, named=False)
        except Exception:  # its tokenizer has attributes for its tokens
            processor = _with_ids(cls, directory, model.config, extractor, named=True)
        if chat_template:
            processor.chat_template = chat_template
        processor.save_pretrained(directory)
    return True


def _with_ids(cls: Any, directory: Path, config: Any, extractor: Any, *, named: bool) -> Any:
    """A processor whose places of pictures and sounds have the ids that the config states."""
    tokens, ids = _tokens_of(cls, named=named), _ids_by_name(config)

    def made() -> Any:
        tokenizer = save_tokenizer(directory, special=_numbered(tokens, ids), named=named)
        return _made(cls, directory, config, tokenizer, extractor)

    processor = made()
    for medium in ("image", "video", "audio"):
        token = _place(processor, medium)
        if token and medium in ids and tokens.get(token) not in ids:
            others = {each: name for each, name in tokens.items() if name != medium and each != token}
            tokens = {token: medium} | others
    processor = made()
    for medium in ("image", "audio"):
        token = _place(processor, medium)
        if token and len(processor.tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(f"{token} is not one token")
    if missing := [
        name for name, each in vars(processor).items() if name.endswith("_token") and each is None
    ]:
        raise ValueError(f"the tokenizer has no {missing[0]}")
    return processor


def _place(processor: Any, medium: str) -> str:
    """The token that stands for the embeddings of a picture or sound in the model's inputs."""
    number = getattr(processor, f"{medium}_token_id", None)
    token = getattr(processor, f"{medium}_token", None) or ""
    return str(token) if number is None else str(processor.tokenizer.convert_ids_to_tokens(number))


def _tokens_of(cls: Any, *, named: bool) -> dict[str, str]:
    """The special tokens that a processor's code names, and the names that it calls them by."""
    source = "".join(inspect.getsource(each) for each in cls.__mro__ if each.__name__ == cls.__name__)
    names = {each.removesuffix("_token") for each in _OF_TOKENIZER.findall(source)} if named else set()
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


def _made(cls: Any, directory: Path, config: Any, tokenizer: Any, extractor: Any) -> Any:
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "image_processor":
            given[name] = picture_processor(config, like=cls.__name__)
        elif name == "tokenizer" or name.endswith("_tokenizer"):
            given[name] = tokenizer
        elif name in ("feature_extractor", "audio_processor"):
            given[name] = extractor
        elif name == "video_processor":
            given[name] = _videos().from_pretrained(directory)
        elif name not in ("self", "args", "kwargs", "chat_template", "image_token", "video_token"):
            stated = _stated(config, name)
            if stated is None:
                stated = _GIVEN.get(name)
            if stated is None and name in ("num_image_tokens", "image_seq_len", "image_seq_length"):
                stated = _num_places(config)
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


def picture_processor(config: Any, *, like: str = "") -> Any:
    """A family's image processor of the Pillow kind, for pictures as small as the model's.

    `like` is the class of the joint processor that it is for.
    """
    same = [family for family, name in PROCESSOR_MAPPING_NAMES.items() if name == like]
    families = [config.model_type, re.sub("_vision(_model)?$", "", config.model_type), *same]
    known = [IMAGE_PROCESSOR_MAPPING_NAMES.get(each) for each in families]
    backends = next((each for each in known if each), {"pil": "ViTImageProcessorPil"})
    name = backends.get("pil", None if like else "ViTImageProcessorPil")
    if name is None:
        raise ValueError(f"{config.model_type} has no image processor without torchvision")
    cls = getattr(transformers, name)
    side = _side(config)
    given: dict[str, Any] = {}
    for field in ("size", "crop_size", "max_image_size", "min_image_size"):
        default = getattr(cls, field, None)
        if default is not None:
            given[field] = _small(default, side)
    kwargs = getattr(getattr(cls, "valid_kwargs", None), "__annotations__", {})
    for field in {*dir(cls), *kwargs}:
        if not field.startswith("_") and field not in (*given, "num_channels", "model_type", "image_size"):
            stated = _stated(config, field)
            if stated is not None and not callable(getattr(cls, field, None)):
                given[field] = stated
    made = cls(**given)
    if like and getattr(made, "image_seq_length", None) is None:
        made.image_seq_length = _num_places(config)
    return made


def _small(default: Any, side: int) -> Any:
    keys = dict(default) if isinstance(default, Mapping) else {}
    if set(keys) == {"shortest_edge", "longest_edge"} and keys["longest_edge"] > 100_000:  # pixels
        return {"shortest_edge": side * side // 4, "longest_edge": side * side}
    return dict.fromkeys(keys, side) if keys else side


def _num_places(config: Any) -> int:
    """The places of a picture in a text: a resampler's latents, or the patches, as far as they are merged."""
    if config.model_type in _PLACES:
        return _PLACES[config.model_type]
    latents = _stated(config, "resampler_n_latents")
    for part in _parts(config):
        latents = latents or getattr(part.get("perceiver_config"), "resampler_n_latents", None)
    patch = _stated(config, "patch_size")
    patches = (_side(config) // (patch if isinstance(patch, int) else 8)) ** 2
    names = ("scale_factor", "downsample_ratio", "pixel_shuffle_factor")
    scale = next((found for name in names if (found := _stated(config, name))), 1)
    return int(latents or (patches * scale**2 if scale < 1 else patches // scale**2))


def _side(config: Any) -> int:
    for part in _parts(config):
        size = part.get("image_size")
        size = size[0] if isinstance(size, list | tuple) else size
        if isinstance(size, int):
            return size
    return 32
