"""Tiny random checkpoints of every model type that transformers knows, for `python -m benchmarks.families`.

Weights are random, and none is zero: no projection, gate or norm hides what lies behind it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from benchmarks.families.config import IMAGE, tiny_config
from benchmarks.families.tables import CLASSES, VARIANTS
from tests.tiny_models import randomize, save_tokenizer
from tests.tiny_processors import picture_processor, save_processor

TOO_LARGE = 16_000_000
"""Parameters; a config that still has more after shrinking lacks a rule."""
MAPPINGS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
)
"""From the most to the least used head."""


def model_types() -> dict[str, str]:
    """Every model type that has a model, and the class most used of it: transformers' own mappings.

    A variant of a type has a name of its own, as in `t5/gated`.
    """
    found: dict[str, str] = {}
    names = [f"MODEL_FOR_{name}_MAPPING_NAMES" for name in MAPPINGS] + ["MODEL_MAPPING_NAMES"]
    names += sorted(
        name
        for name in dir(modeling_auto)
        if re.fullmatch(r"MODEL_\w+_MAPPING_NAMES", name) and name not in names
    )
    for name in names:
        for model_type, classes in getattr(modeling_auto, name).items():
            found.setdefault(model_type, classes if isinstance(classes, str) else classes[0])
    found |= CLASSES
    found |= {name: found[name.partition("/")[0]] for name in VARIANTS}
    return dict(sorted(found.items()))


def tiny_model(model_type: str, class_name: str) -> Any:
    """A random model in eval mode."""
    config = tiny_config(model_type)
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        size = sum(each.numel() for each in _make(cls, config).parameters())
    if size > TOO_LARGE:
        raise ValueError(f"{size} parameters: the rules leave a size that is too large")
    model = _make(cls, tiny_config(model_type))
    randomize(model, seed=0)
    return model.eval()


def _make(cls: Any, config: Any) -> Any:
    kind = getattr(cls, "config_class", None)
    return cls(config) if kind is None or isinstance(config, kind) else cls._from_config(config)


def image_size(config: Any) -> int:
    """Pixels of a side of the pictures that a model is made for."""
    for part in (getattr(config, "vision_config", None), getattr(config, "encoder", None), config):
        size = getattr(part, "image_size", None)
        size = size[0] if isinstance(size, list | tuple) else size
        if isinstance(size, int):
            return size
    return IMAGE


def save(model: Any, directory: Path) -> str:
    """The checkpoint, and what turns rows into its inputs. Returns why it has no joint processor, if so."""
    model.save_pretrained(directory)
    reads, why = set(arguments(model)), "it reads no text"
    extractor = None
    if {"input_values", "input_features"} & reads:
        extractor = _feature_extractor(model.config, "input_values" in reads)
    if "input_ids" in reads:
        try:
            if save_processor(directory, model, extractor=extractor):
                return ""
            why = "its family has none"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    save_parts(model, directory, extractor)
    return why


def save_parts(model: Any, directory: Path, extractor: Any = None) -> None:
    """A tokenizer, and a processor of pictures or sounds alone, in place of a joint processor."""
    (directory / "processor_config.json").unlink(missing_ok=True)
    reads = set(arguments(model))
    if "input_ids" in reads or "decoder_input_ids" in reads:
        save_tokenizer(directory)
    if {"pixel_values", "flattened_patches"} & reads:
        picture_processor(model.config).save_pretrained(directory)
    elif extractor is not None:
        extractor.save_pretrained(directory)


def _feature_extractor(config: Any, plain: bool) -> Any:
    """The family's own feature extractor, for as many mel bins as the model takes."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    usual = "Wav2Vec2FeatureExtractor" if plain else "WhisperFeatureExtractor"
    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(config.model_type, usual)
    if not plain and name == "Wav2Vec2FeatureExtractor":  # as its published checkpoints have it
        name = "SeamlessM4TFeatureExtractor"
    cls = getattr(transformers, name)
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    names = ("num_mel_bins", "input_feat_per_channel", "input_feat_size", "feature_projection_input_dim")
    found = [getattr(part, name, None) for part in parts for name in names]
    bins = [value for value in found if isinstance(value, int)]
    fields = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {}
    if name == "SeamlessM4TFeatureExtractor" and bins:
        bins = [bins[0] // 2]  # it stacks two frames
    if bins and not (plain and usual == cls.__name__):
        given = {name: bins[0] for name in ("feature_size", "num_mel_bins") if name in fields}
    if "max_length" in fields and hasattr(config, "max_length") and config.model_type.startswith("audio-s"):
        given["max_length"] = config.max_length
    if cls.__name__ == "ClapFeatureExtractor":
        given["truncation"] = "rand_trunc"  # for models without fusion
    if cls.__name__ == "WhisperFeatureExtractor":
        given["chunk_length"] = 1
        positions = next((each for part in parts if (each := getattr(part, "max_source_positions", 0))), 50)
        given["hop_length"] = 16000 // (2 * positions)  # as many frames as the encoder takes
    return cls(**given)


def arguments(model: Any) -> set[str]:
    """The arguments of a model's forward, and its main inputs."""
    main = model.main_input_name
    names = set(inspect.signature(model.forward).parameters)
    return names | ({main} if isinstance(main, str) else set(main))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every float tensor in an output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if name not in ("past_key_values", "loss", "encoder_last_hidden_state"):
                yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
