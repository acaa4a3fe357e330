"""From the original checkpoint and the compressed layers to a checkpoint that transformers loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ffsplit.ffn import LayerLayout, is_stock_form
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.headers import INDEX_NAME, TensorInfo, opened
from ffsplit.models.places import FFNPlace

MAX_SHARD_BYTES = 5 * 10**9
COMPANIONS = re.compile(r".*\.(json|txt|model|tiktoken|jinja)$|(LICEN[CS]E|NOTICE).*")
"""Files beside the weights that an artifact keeps: configs, tokenizers, licences."""


def is_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether stock modelling code can load it: one width for all layers, dense, no added bias."""
    return is_stock_form(layouts, checkpoint.shapes, groups=checkpoint.width_groups)


def assemble(
    checkpoint: Checkpoint,
    layer_files: Sequence[Path],
    layouts: Sequence[LayerLayout],
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint: every tensor that is no FFN's as it was, the compressed layers beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    replaced = {name for ffn in checkpoint.ffns for name in ffn.tensor_names}
    sources: dict[str, tuple[Path, int]] = {
        name: (checkpoint.directory / info.file, info.size_bytes)
        for name, info in checkpoint.tensors.items()
        if name not in replaced
    }
    for path in layer_files:
        with opened(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                sources[name] = (path, _size_bytes(view))
    _write_shards(sources, directory, max_shard_bytes=max_shard_bytes)
    config = artifact_config(checkpoint, layouts)
    _copy_companions(checkpoint.directory, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def replace_weights(directory: Path, replacements: Path) -> None:
    """Rewrite a checkpoint in place with the tensors of another file under the same names."""
    with opened(replacements, "pt") as new:
        names = set(new.keys())
        for path in sorted(directory.glob("*.safetensors")):
            with opened(path, "pt") as old:
                tensors = {
                    name: new.get_tensor(name) if name in names else old.get_tensor(name)
                    for name in old.keys()  # noqa: SIM118
                }
            rewritten = path.with_suffix(".rewritten")
            save_file(tensors, rewritten, {"format": "pt"})
            rewritten.replace(path)


def artifact_config(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> dict[str, Any]:
    """The original's config with the new width, or with the layout of every layer."""
    config = dict(checkpoint.config)
    if is_plain(checkpoint, layouts):
        for ffn, layout in zip(checkpoint.ffns, layouts, strict=True):
            config = _with_width(config, ffn, layout.num_neurons)
    else:
        config["quantization_config"] = {
            "quant_method": "ffsplit",
            "version": 1,
            "layers": [layout.model_dump(mode="json") for layout in layouts],
            "shapes": [shape.model_dump(mode="json") for shape in checkpoint.shapes],
        }
    return config


def _with_width(config: dict[str, Any], ffn: FFNPlace, width: int) -> dict[str, Any]:
    """A config that states an FFN's width where its tower's code looks for it."""
    part, field = ffn.width_key
    if field is None:
        return config
    if part is None:
        return config | {field: width}
    parts = [part, *([f"{part}_dict"] if isinstance(config.get(f"{part}_dict"), dict) else [])]
    return config | {name: dict(config.get(name) or {}) | {field: width} for name in parts}


def _size_bytes(view: Any) -> int:
    return TensorInfo("", view.get_dtype(), tuple(view.get_shape())).size_bytes


def _write_shards(sources: Mapping[str, tuple[Path, int]], directory: Path, *, max_shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sources):
        size = sources[name][1]
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        save_file({name: _read(sources[name][0], name) for name in names}, directory / file, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(size for _, size in sources.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _read(path: Path, name: str) -> Tensor:
    with opened(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _copy_companions(source: Path, directory: Path) -> None:
    """Copy what belongs to the model beside its weights; the folders that modules.json names too."""
    for path in sorted(source.iterdir()):
        if path.is_file() and COMPANIONS.match(path.name) and path.name != INDEX_NAME:
            shutil.copyfile(path, directory / path.name)
    modules = source / "modules.json"
    if not modules.is_file():
        return
    for module in json.loads(modules.read_text("utf-8")):
        folder = source / str(module.get("path", ""))
        if folder != source and folder.is_dir() and folder.parent == source:
            (directory / folder.name).mkdir(exist_ok=True)
            for path in sorted(folder.glob("*.json")):
                shutil.copyfile(path, directory / folder.name / path.name)
