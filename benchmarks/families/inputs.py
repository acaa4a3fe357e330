"""Example inputs for a tiny model of any family: several guesses, of which the first that runs is taken."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.families.config import IMAGE
from benchmarks.families.tables import INPUTS
from benchmarks.families.tiny import arguments, image_size, tensors_of

ROWS, TOKENS = 2, 8
FIRST_WORD, LAST_WORD = 45, 180
"""Token ids that mean nothing special."""
Inputs = dict[str, Any]
IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_token_index", "boi_token_id", "im_patch_id")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index")


class Ran(NamedTuple):
    """Inputs that a model runs on, its float outputs on them, and which kinds of input they hold."""

    inputs: Inputs
    outputs: list[Tensor]
    reads: str


def run(model: Any, inputs: Inputs) -> list[Tensor]:
    """Every float output, from the same random state each time."""
    torch.manual_seed(0)
    with torch.inference_mode():
        copied = {name: each.clone() if isinstance(each, Tensor) else each for name, each in inputs.items()}
        return [each.float() for each in tensors_of(model(**copied))]


def first_that_runs(model: Any, model_type: str) -> Ran:
    """The richest inputs that the model runs on. Raises the error of the first guess if none does."""
    first_error: Exception | None = None
    for reads, inputs in _guesses(model, model_type):
        try:
            outputs = run(model, inputs)
        except Exception as error:
            first_error = first_error or error
            continue
        if outputs and all(bool(torch.isfinite(each).any()) for each in outputs if each.numel()):
            return Ran(inputs, outputs, reads)
        first_error = first_error or ValueError("no finite output")
    raise first_error or ValueError("no guess of its inputs")


def _guesses(model: Any, model_type: str) -> Iterator[tuple[str, Inputs]]:
    given = INPUTS.get(model_type.partition("/")[0])
    names = arguments(model)
    text = list(_texts(model, names))
    if given is not None:
        for words in text:
            yield "given", {**words, **_made(given)}
        yield "given", _made(given)
    media = list(_pictures(model, names)) + list(_videos(names)) + list(_sounds(model, names))
    for reads, each in media if given is not None else ():
        for words in text[:1]:
            yield f"{reads}, text", {**words, **each, **_made(given)}
    for reads, each in media:
        for words in _with_placeholders(model, text, reads, each) if text else ():
            yield f"{reads}, text", {**words, **each}
    for reads, each in media:
        for words in text:
            if "decoder_input_ids" in words:
                yield reads, {**{name: words[name] for name in words if name.startswith("decoder")}, **each}
        yield reads, each
    for words in text:
        yield "text", words


def _made(given: dict[str, Any]) -> Inputs:
    """Inputs from a table: a shape gives random floats, ("ids", shape) tokens, anything else itself."""
    generator = torch.Generator().manual_seed(1)
    made: Inputs = {}
    for name, each in given.items():
        if isinstance(each, tuple) and each and each[0] == "ids":
            made[name] = torch.randint(1, each[2], each[1], generator=generator)
        elif isinstance(each, tuple) and each and each[0] == "whole":
            made[name] = torch.randint(1, each[2], each[1], generator=generator).float()
        elif isinstance(each, tuple) and each and each[0] == "ones":
            made[name] = torch.ones(each[1], dtype=torch.long)
        elif isinstance(each, tuple):
            made[name] = torch.randn(each, generator=generator)
        elif isinstance(each, list):
            made[name] = torch.tensor(each)
        else:
            made[name] = each
    return made


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _texts(model: Any, names: set[str]) -> Iterator[Inputs]:
    if "input_ids" not in names and "decoder_input_ids" not in names:
        return
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(FIRST_WORD, LAST_WORD, (ROWS, TOKENS), generator=generator)
    smaller = tokens % 31 + 1
    mask = torch.ones_like(tokens)
    for ids in (tokens, smaller):
        inputs: Inputs = {}
        if "input_ids" in names:
            inputs["input_ids"] = ids
            if "attention_mask" in names:
                inputs["attention_mask"] = mask
        if "bbox" in names:
            inputs["bbox"] = torch.tensor([1, 2, 5, 7]).expand(ROWS, TOKENS, 4).clone()
        if "decoder_input_ids" in names:
            inputs["decoder_input_ids"] = ids.flip(0)
        yield inputs
        if "bbox" in inputs:
            yield {name: each for name, each in inputs.items() if name != "bbox"}
        if "use_cache" in names:
            yield {**inputs, "use_cache": False}
        if "attention_mask" in inputs:
            yield {name: each for name, each in inputs.items() if name != "attention_mask"}


def _vision_config(model: Any) -> Any:
    config = model.config
    for name in ("vision_config", "encoder", "vit_config"):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, int | str):
            return part
    return config


def _pictures(model: Any, names: set[str]) -> Iterator[tuple[str, Inputs]]:
    vision = _vision_config(model)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    patch = getattr(vision, "patch_size", 8)
    patch = patch if isinstance(patch, int) else 8
    temporal = getattr(vision, "temporal_patch_size", 1) or 1
    side = image_size(model.config)
    if "hidden_states" in names and "grid_thw" in names:
        grid = torch.tensor([[1, 4, 4]] * ROWS)
        yield (
            "pictures",
            {"hidden_states": _randn(ROWS * 16, channels * temporal * patch * patch), "grid_thw": grid},
        )
    if "pixel_values" not in names:
        return
    if "image_grid_thw" in names or "grid_thw" in names:
        key = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
        grid = torch.tensor([[1, 4, 4]] * ROWS)
        yield "pictures", {"pixel_values": _randn(ROWS * 16, channels * temporal * patch * patch), key: grid}
        yield "pictures", {"pixel_values": _randn(ROWS * 16, channels, patch, patch), key: grid}
    sizes = torch.tensor([[side, side]] * ROWS)
    for shape in (
        (ROWS, channels, side, side),
        (ROWS, 1, channels, side, side),
        (ROWS, 2, channels, side, side),
        (ROWS, 1, 1, channels, side, side),
        (ROWS, 4, channels, side, side),
        (ROWS, channels, 64, 64),
        (ROWS, channels, 128, 128),
        (ROWS, (side // patch) ** 2, channels * patch * patch),
    ):
        extras: Inputs = {"pixel_values": _randn(*shape)}
        if "image_sizes" in names:
            yield "pictures", {**extras, "image_sizes": sizes}
        if "pixel_attention_mask" in names and len(shape) in (4, 5):
            mask = torch.ones(*shape[:-3], *shape[-2:], dtype=torch.long)
            yield "pictures", {**extras, "pixel_attention_mask": mask}
        if "spatial_shapes" in names:
            many = side // patch
            spatial = torch.tensor([[many, many]] * ROWS)
            patches = _randn(ROWS, many * many, channels * patch * patch)
            yield (
                "pictures",
                {
                    "pixel_values": patches,
                    "spatial_shapes": spatial,
                    "pixel_attention_mask": torch.ones(ROWS, many * many, dtype=torch.long),
                },
            )
        yield "pictures", extras


def _videos(names: set[str]) -> Iterator[tuple[str, Inputs]]:
    for name in ("pixel_values_videos", "pixel_values"):
        if name in names:
            for frames in (4, 8, 16, 2):
                yield "videos", {name: _randn(ROWS, frames, 3, IMAGE, IMAGE)}


def _sounds(model: Any, names: set[str]) -> Iterator[tuple[str, Inputs]]:
    audio = next(
        (
            part
            for part in (getattr(model.config, name, None) for name in ("audio_config", "encoder_config"))
            if part is not None
        ),
        model.config,
    )
    mels = next(
        (
            size
            for size in (
                getattr(audio, name, None)
                for name in (
                    "num_mel_bins",
                    "feature_projection_input_dim",
                    "input_feat_per_channel",
                    "input_feat_size",
                    "input_dim",
                )
            )
            if isinstance(size, int)
        ),
        16,
    )
    if "input_values" in names:
        for shape in ((ROWS, 2000), (ROWS, 1, 4000), (ROWS, 64, mels), (ROWS, 1, 64, mels), (ROWS, 24000)):
            yield "sound", {"input_values": _randn(*shape)}
    if "input_features" in names:
        positions = getattr(audio, "max_source_positions", 64)
        for frames, turned in itertools.product((64, 2 * positions, 128, 32), (False, True)):
            shape = (ROWS, frames, mels) if turned else (ROWS, mels, frames)
            inputs: Inputs = {"input_features": _randn(*shape)}
            for name in ("feature_attention_mask", "input_features_mask"):
                if name in names:
                    kind = torch.bool if name == "input_features_mask" else torch.long
                    yield "sound", {**inputs, name: torch.ones(ROWS, frames, dtype=kind)}
            yield "sound", inputs


def _with_placeholders(model: Any, text: list[Inputs], reads: str, media: Inputs) -> Iterator[Inputs]:
    """Texts with as many placeholder tokens as the model makes embeddings of the pictures or sounds."""
    names = AUDIO_TOKENS if reads == "sound" else IMAGE_TOKENS
    configs = (model.config, getattr(model.config, "vlm_config", None))
    tokens = (getattr(config, name, None) for config in configs for name in names)
    token = next((each for each in tokens if isinstance(each, int)), None)
    count = _num_embeddings(model, reads, media) or _num_missing(model, {**text[0], **media})
    if token is not None and count:
        for words in text[:1]:
            ids = words.get("input_ids")
            if ids is None:
                continue
            places = torch.full((ROWS, count), token)
            long = torch.cat([ids[:, :1], places, ids[:, 1:]], 1)
            more: Inputs = {**words, "input_ids": long}
            if "attention_mask" in words:
                more["attention_mask"] = torch.ones_like(long)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inspect.signature(model.forward).parameters:
                    yield {**more, name: (long == token).long()}
            yield more
    yield from text[:1]
    for words in text[1:]:
        if "attention_mask" not in words:
            yield words
            return


def _num_embeddings(model: Any, reads: str, media: Inputs) -> int:
    """Embeddings per row that pictures or sounds become; 0 if the model cannot tell."""
    base = getattr(model, "model", model)
    name = "get_audio_features" if reads == "sound" else "get_image_features"
    for each in (model, base):
        method = getattr(each, name, None)
        if method is None:
            continue
        with suppress(Exception), torch.inference_mode():
            found = method(**media)
            found = getattr(found, "pooler_output", None) if hasattr(found, "pooler_output") else found
            pieces = [found] if isinstance(found, Tensor) else list(found)
            number = sum(piece.numel() // piece.shape[-1] for piece in pieces)
            return number // ROWS
    return 0


def _num_missing(model: Any, inputs: Inputs) -> int:
    """Placeholders per row that a model asks for when there are none; 0 if it does not say."""
    try:
        run(model, inputs)
    except Exception as error:
        stated = re.search(r"features: (\d+)", str(error))
        return int(stated[1]) // ROWS if stated else 0
    return 0
