"""Loading dense and compressed models through transformers, quietly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import Checkpoint, tokenizer_files


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and only errors logged, while a model that is known to be fine is loaded."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_base_model(directory: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model without its task head, in eval mode."""
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(directory, dtype=dtype, local_files_only=True, use_safetensors=True)
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0  # the same result, and hooks see whole rows
    return model.to(device).eval()


def load_whole_model(directory: Path, class_name: str, **options: Any) -> Any:
    """The model as the class it was saved from, in eval mode; options go to from_pretrained."""
    chosen = model_class(class_name, where=directory)
    with quiet_transformers():
        model = chosen.from_pretrained(directory, local_files_only=True, use_safetensors=True, **options)
    return model.eval()


def model_class(class_name: str, *, where: Path) -> Any:
    """A class of transformers by its name, AutoModel for none. Raises ConfigError when there is no such."""
    import transformers

    found = getattr(transformers, class_name or "AutoModel", None)
    if found is None:
        raise ConfigError(f"{where}: transformers {transformers.__version__} has no class {class_name}")
    return found


def random_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Any:
    """A model of the checkpoint's class and shape with random weights, in eval mode."""
    import transformers

    model_class = getattr(transformers, checkpoint.class_name, transformers.AutoModel)
    with quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
        make = getattr(model_class, "_from_config", None) or model_class.from_config
        model = make(config)
    return model.to(dtype).eval()


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises ConfigError when it has none that works."""
    from transformers import AutoTokenizer

    if not tokenizer_files(checkpoint.directory):  # transformers would make an empty one up
        raise ConfigError(f"{checkpoint.directory} has no tokenizer: put its tokenizer.json beside the model")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{checkpoint.directory} has no tokenizer that loads: {reason}") from None
