"""From what a user calls a model, a directory or a hub id, to a directory on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ffsplit.artifacts.inputs import StoredFiles, is_remote, stored_files
from ffsplit.errors import ConfigError
from ffsplit.home import user_path
from ffsplit.models.trust import trusted

HUB_ID = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")
WANTED_FILES = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "README.md",
    "LICENSE*",
]

WANTED_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja", ".md", "LICENSE")
CODE_SUFFIXES = (".py",)
"""Wanted too where a model's own code is trusted."""
GENERIC_NAMES = ("model", "checkpoint", "final", "best")


class LocatedModel(NamedTuple):
    """A model's directory, the hub revision it was resolved to, and for a model in a store, its files there.

    The directory is one of this machine; other nodes materialize `stored`.
    """

    directory: Path
    revision: str | None
    stored: StoredFiles | None = None


def locate_model(model: str, *, revision: str | None = None) -> LocatedModel:
    """Find a local directory, or bring one of s3:// or a snapshot of a hub id into a cache.

    Raises ConfigError when there is no such directory and the hub does not have it either.
    """
    if is_remote(model):
        if revision is not None:
            raise ConfigError(f"--revision is for hub ids; {model} is in a store")
        stored = stored_files(model, suffixes=(*WANTED_SUFFIXES, *_code_suffixes()))
        return LocatedModel(stored.materialize(), None, stored)
    directory = user_path(model)
    if directory.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision is for hub ids; {model} is a local directory")
        return LocatedModel(directory.resolve(), None)
    if directory.exists():
        raise ConfigError(f"model {model} is a file; give the directory that holds config.json")
    if not HUB_ID.match(model) or model.startswith("."):
        raise ConfigError(f"model directory {model} does not exist")
    return _download(model, revision)


def _code_suffixes() -> tuple[str, ...]:
    return CODE_SUFFIXES if trusted() else ()


def _download(model: str, revision: str | None) -> LocatedModel:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*WANTED_FILES, *(f"*{each}" for each in _code_suffixes())],
        )
    except Exception as error:  # the hub client raises a score of types, requests' and its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model {model}: no such directory, and not had from the hub ({reason})") from None
    return LocatedModel(Path(path), Path(path).name)


def model_name(model: str) -> str:
    """What to call a model in a report: a hub id, or a local directory by its own name.

    Where that is generic, its parent's goes before it.
    """
    path = user_path(model).resolve()
    if not path.is_dir():
        return model
    return f"{path.parent.name}/{path.name}" if path.name in GENERIC_NAMES else path.name
