"""Recognises folders that cannot be compressed: what they are instead, and how to fix that."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.models.folder import CONFIG_NAME, OTHER_FORMATS, PICKLE_SUFFIXES, FolderFiles, Listing

ADAPTER_CONFIG = "adapter_config.json"
MODULES = "modules.json"
MODULE_FOLDER = re.compile(r"(\d+_\w+)/config\.json")
HUB_FOLDER = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?")
MERGE = "merge it into its base (peft: merge_and_unload, then save_pretrained)"
MOST_FOLDERS = 3
SENTENCEPIECE_FILE = re.compile(r"(tokenizer|spiece|spm|sentencepiece).*\.model")
OTHER_VOCABULARIES = ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt")
QUANTIZED_TENSORS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or ModelOpt",
    "weight_scale_inv": "FP8",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
}
"""Tensor name endings of integer or float8 weights, and the tools that write them."""
QUANTIZED_CONFIGS = {"compression_config": "compressed-tensors", "quantization": "MLX"}


def check_is_model(listing: Listing) -> None:
    """Raise ConfigError unless a folder holds a whole model with safetensors weights."""
    names, where = listing.names, listing.where
    if CONFIG_NAME not in names:
        raise ConfigError(_what_else(listing))
    if ADAPTER_CONFIG in names:
        raise ConfigError(
            f"{where} holds an adapter beside whole weights, and which of the two loads depends on whether "
            f"peft is installed: {MERGE}, or remove {ADAPTER_CONFIG} and its weights"
        )
    at_root = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") for name in at_root):
        return
    others = sorted(name for name in at_root if OTHER_FORMATS.fullmatch(name))
    pickled = sorted(name for name in at_root if name.endswith(PICKLE_SUFFIXES))
    if pickled:
        raise ConfigError(
            f"{where} holds only pickled weights, which can run code ({pickled[0]}): convert them to "
            "safetensors with save_pretrained"
        )
    if others:
        raise ConfigError(
            f"{where} holds its weights only as {others[0]}: convert them to safetensors (save_pretrained)"
        )


def check_modules(listing: Listing, files: FolderFiles) -> None:
    """Raise ConfigError for a sentence-transformers model that would lose weights, or is in a sub-folder."""
    if MODULES not in listing.names:
        return
    modules, where = listing.read_json(MODULES), listing.where
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{where}/{MODULES} is not a list of modules")
    paths = [str(module.get("path") or "").strip("/") for module in modules]
    if paths and paths[0] and f"{paths[0]}/{CONFIG_NAME}" in listing.names:
        raise ConfigError(_transformer_elsewhere(where, paths[0]))
    for path in filter(None, paths):
        inside = [name for name in listing.names if name.startswith(f"{path}/")]
        weights = [name for name in inside if name.endswith((".safetensors", *PICKLE_SUFFIXES))]
        if weights and not any(name in files.companions for name in weights):
            raise ConfigError(
                f"{where}: {', '.join(sorted(weights))}: this module's only weights are not safetensors: "
                "save the model again with SentenceTransformer(...).save_pretrained, which writes safetensors"
            )


def _transformer_elsewhere(where: str, folder: str) -> str:
    return (
        f"{where} is a sentence-transformers model whose transformer is in {folder}/: save it again with "
        "SentenceTransformer(...).save_pretrained, which puts it beside modules.json, and give that directory"
    )


def _what_else(listing: Listing) -> str:
    """What a folder without a config.json is, and what to give instead."""
    names, where = listing.names, listing.where
    if ADAPTER_CONFIG in names:
        stated = listing.read_json(ADAPTER_CONFIG)
        base = stated.get("base_model_name_or_path") if isinstance(stated, dict) else None
        of = f" of {base}" if base else ""
        return f"{where} is an adapter{of}, not a whole model: {MERGE}, and give that directory"
    modules = [match[1] for match in map(MODULE_FOLDER.fullmatch, names) if match]
    if MODULES in names and modules:
        return _transformer_elsewhere(where, min(modules))
    if cache := _hub_cache(where, names):
        return cache
    folders = sorted(
        name.removesuffix(f"/{CONFIG_NAME}") for name in names if name.endswith(f"/{CONFIG_NAME}")
    )
    if folders:
        shown = ", ".join(f"{where}/{folder}" for folder in folders[:MOST_FOLDERS])
        more = f" and {len(folders) - MOST_FOLDERS} more" if len(folders) > MOST_FOLDERS else ""
        return f"{where} is not a model: it has no config.json; these folders below it do: {shown}{more}"
    others = sorted(name for name in names if OTHER_FORMATS.fullmatch(name))
    if others:
        return (
            f"{where} holds {others[0]} and no config.json: give the original transformers checkpoint, whose "
            "weights are safetensors"
        )
    return f"{where} is not a model: it has no config.json"


def _hub_cache(where: str, names: Collection[str]) -> str | None:
    """The message for a hub cache, a repository in one, or its snapshots; None for other folders."""
    first = {name.split("/")[0] for name in names}
    cached = sorted(_hub_id(match) for match in map(HUB_FOLDER.fullmatch, first) if match)
    if cached:
        return f"{where} is a cache of the hub: give the id of a model, such as {cached[0]}"
    repository, _, last = where.rstrip("/").rpartition("/")
    root = repository if last == "snapshots" else where.rstrip("/")
    match = HUB_FOLDER.fullmatch(root.rpartition("/")[2])
    if match is None:
        return None
    inside = "" if last == "snapshots" else "snapshots/"
    found = {name[len(inside) :].split("/")[0] for name in names if name.startswith(inside)}
    snapshots = sorted(f"{where}/{inside}{name}" for name in found if name)
    snapshot = f", or a snapshot, {snapshots[0]}" if snapshots else ""
    return f"{where} is the hub's cache of {_hub_id(match)}: give that id{snapshot}"


def _hub_id(match: re.Match[str]) -> str:
    return "/".join(filter(None, match.groups()))


def check_tokenizer_library(directory: Path) -> None:
    """Raise ConfigError for a tokenizer that only sentencepiece reads, if that is not installed.

    transformers would take the file for another format, and ask for another library.
    """
    if find_spec("sentencepiece") is not None:
        return
    if any((directory / name).is_file() for name in OTHER_VOCABULARIES):
        return
    for path in sorted(directory.iterdir()):
        if SENTENCEPIECE_FILE.fullmatch(path.name) and path.is_file():
            with path.open("rb") as file:
                if file.read(1) == b"\n":  # a protocol buffer that begins with the pieces
                    raise ConfigError(
                        f"{path} needs sentencepiece, which is not installed: pip install "
                        "sentencepiece, or put the model's tokenizer.json beside it"
                    )


def check_not_quantized(where: str, config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Raise UnsupportedModelError for quantized weights whose config has no quantization_config."""
    found = {name.rpartition(".")[2]: name for name in tensors}
    evidence = [(method, f"tensor {found[end]}") for end, method in QUANTIZED_TENSORS.items() if end in found]
    evidence += [
        (method, f"{field} in config.json")
        for field, method in QUANTIZED_CONFIGS.items()
        if isinstance(config.get(field), dict) and config[field].get("format") != "dense"
    ]
    if evidence:
        method, shown = evidence[0]
        raise UnsupportedModelError(
            f"{where} is quantized already ({method}: {shown}): start from the original checkpoint"
        )
