"""`ffsplit benchmark`: time an artifact and its original, or one model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ffsplit.artifacts.locate import locate, read_manifest
from ffsplit.artifacts.manifest import Latency
from ffsplit.artifacts.pull import materialize
from ffsplit.errors import ConfigError
from ffsplit.measurement.latency import paired_latency
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.models.locate import locate_model

SHAPES = ((1, 16), (1, 128), (8, 128))
NUM_PAIRS = 30


def benchmark(uri: str, *, against: str | None = None) -> tuple[Latency, ...]:
    """Paired latencies of the model at `uri` and another one, in this process, on the CPU or the GPU.

    `uri` is an artifact or a dense model. An artifact is compared with `against`, or with the model
    it was made from; a dense model with `against`, or with itself. Raises ConfigError when either is
    missing, or the original is not the one the artifact was made from any more.
    """
    try:
        location = locate(uri)
    except ConfigError:
        compressed_directory = open_checkpoint(locate_model(uri).directory).directory
        original_directory = locate_model(against or uri).directory
    else:
        compressed_directory = materialize(uri)
        manifest = read_manifest(location)
        if manifest.kind != "model":
            raise ConfigError(f"{uri} holds statistics, no model")
        original_directory = locate_model(
            against or manifest.config.model, revision=manifest.model.revision
        ).directory
        if against is None and open_checkpoint(original_directory).model_digest() != manifest.model.digest:
            raise ConfigError(
                f"{manifest.config.model} has changed since the artifact was made: give --against MODEL"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = open_checkpoint(original_directory).max_positions or max(tokens for _, tokens in SHAPES)
    shapes = tuple(dict.fromkeys((rows, min(tokens, longest)) for rows, tokens in SHAPES))
    models = [_load(directory).to(device) for directory in (original_directory, compressed_directory)]
    return paired_latency(*models, shapes=shapes, num_pairs=NUM_PAIRS)


def _load(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text("utf-8"))
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    return load_whole_model(directory, (config.get("architectures") or [""])[0], dtype=dtype)
