"""Tiny models with and without heads, loaded, and their tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_tokenizer, load_whole_model
from tests.conftest import CheckpointFactory


class Loaded(NamedTuple):
    """A checkpoint with its model and tokenizer in memory."""

    checkpoint: Checkpoint
    model: Any
    tokenizer: Any


LoadedFactory = Callable[..., Loaded]


def load(directory: Path) -> Loaded:
    checkpoint = open_checkpoint(directory)
    model = load_whole_model(directory, checkpoint.class_name, dtype=torch.float32)
    return Loaded(checkpoint, model, load_tokenizer(checkpoint))


@pytest.fixture
def loaded(checkpoint_of: CheckpointFactory) -> LoadedFactory:
    """`loaded("bert", head="ForSequenceClassification")`."""
    return lambda family, **options: load(checkpoint_of(family, **options))
