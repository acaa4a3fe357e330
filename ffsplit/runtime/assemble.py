"""From the original checkpoint and the compressed layers to a checkpoint that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffsplit.ffn.shapes import LayerLayout, is_narrowed_form, is_stock_form
from ffsplit.models.checkpoint import NARROWED, Checkpoint
from ffsplit.models.family import config_part
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.routing import Routing, routing_of
from ffsplit.models.tensor_files import INDEX_NAME, TensorSpan, read_spans, write_spans
from ffsplit.runtime.ffn_tensors import FORMAT_VERSION, runs_of, stack_experts

MAX_SHARD_BYTES = 5 * 10**9


def is_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether stock modelling code can load the result: one width per field, dense, no added bias."""
    return is_stock_form(layouts, checkpoint.shapes, groups=checkpoint.width_groups)


def keeps_names(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether the result has the original's tensor names: its FFNs are only narrowed.

    Experts that one tensor holds must then have one width.
    """
    widths: dict[int, set[int]] = {}
    for ffn, layout in zip(checkpoint.ffns, layouts, strict=True):
        if layout.is_dropped:
            continue
        widths.setdefault(ffn.unit if ffn.is_stacked else ffn.index, set()).add(layout.num_neurons)
    is_even = all(len(each) == 1 for each in widths.values())
    return is_even and is_narrowed_form(layouts, checkpoint.shapes)


def assemble(
    checkpoint: Checkpoint,
    layer_files: Sequence[Path],
    layouts: Sequence[LayerLayout],
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    linears: dict[str, Any] | None = None,
) -> None:
    """Write the checkpoint: the compressed layers, and all tensors outside the FFNs unchanged.

    Routers lose the rows of dropped experts. Tensors of `layer_files` replace the original's of the same
    name. `linears` is the config's entry for quantized attention.

    Bytes are copied from file to file in small pieces, so no whole model or shard is ever in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    spans: dict[str, TensorSpan] = {}
    for file in checkpoint.weight_files:
        spans |= read_spans(checkpoint.directory / file)
    spans = {name: spans[name] for name in checkpoint.tensors if name not in checkpoint.ffn_names}
    parts: dict[str, TensorSpan] = {}
    for path in layer_files:
        parts |= read_spans(path)
    spans |= stack_experts(parts)
    if any(layout.is_dropped for layout in layouts):
        kept_rows = routing_of(checkpoint).kept_rows(layouts)
        spans |= {name: spans[name].rows(kept) for name, kept in kept_rows.items()}
    write_shards(spans, directory, max_shard_bytes=max_shard_bytes)
    config = artifact_config(checkpoint, layouts, linears=linears)
    checkpoint.folder.copy_companions(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def replace_weights(directory: Path, replacements: Path) -> None:
    """Rewrite a checkpoint in place with the tensors of another file under the same names."""
    new = read_spans(replacements)
    for path in sorted(directory.glob("*.safetensors")):
        spans = read_spans(path)
        if new.keys().isdisjoint(spans):  # a companion file of the original
            continue
        rewritten = path.with_suffix(".rewritten")
        write_spans(rewritten, {name: new.get(name, span) for name, span in spans.items()})
        rewritten.replace(path)


def artifact_config(
    checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, linears: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The original's config with the new width, or with the layout of every layer.

    If experts are dropped, with the number that is left; the layouts are then those of the others.
    """
    config = dict(checkpoint.config)
    config.pop("transformers_weights", None)  # the artifact's weights have the usual names
    layouts = [layout.folded for layout in layouts]
    left = [pair for pair in zip(checkpoint.ffns, layouts, strict=True) if not pair[1].is_dropped]
    if len(left) < len(layouts):
        config = _with_fewer_experts(config, routing_of(checkpoint), layouts)
    if is_plain(checkpoint, layouts) and linears is None:
        for ffn, layout in left:
            config = with_width(config, ffn, layout.num_neurons)
    else:
        stored, shapes = [layout for _, layout in left], [ffn.shape for ffn, _ in left]
        config["quantization_config"] = {
            "quant_method": "ffsplit",
            "version": FORMAT_VERSION,
            "ffns": [run.model_dump(mode="json") for run in runs_of(stored, shapes)],
        }
        if keeps_names(checkpoint, layouts) and not is_plain(checkpoint, layouts):
            config["quantization_config"]["form"] = NARROWED
        if linears is not None:
            config["quantization_config"]["linears"] = linears
        if checkpoint.left_out:
            config["quantization_config"]["left_out"] = _left_out(checkpoint)
    return config


def _left_out(checkpoint: Checkpoint) -> list[str]:
    """What is left out: the `blocks` of a tower of which nothing is compressed, else the FFNs' names."""
    compressed = {ffn.tower for ffn in checkpoint.ffns}
    names = (ffn.name if ffn.tower in compressed else ffn.tower.blocks for ffn in checkpoint.left_out)
    return list(dict.fromkeys(names))


def with_width(config: dict[str, Any], ffn: FFNPlace, width: int) -> dict[str, Any]:
    """A config that states an FFN's width where its tower's code looks for it."""
    return _stating(config, ffn.width_key, width // ffn.paths.width_factor)


def _with_fewer_experts(
    config: dict[str, Any], routing: Routing, layouts: Sequence[LayerLayout]
) -> dict[str, Any]:
    """A config that states how many experts of each block are left, by every name that it has for that."""
    number = routing.mixture.num_experts - routing.mixture.num_dropped(layouts)
    stated = config_part(config, routing.part)
    for position, field in enumerate(routing.fields):
        if position == 0 or field in stated:
            config = _stating(config, (routing.part, field), number)
    return config


def _stating(config: dict[str, Any], key: tuple[str | None, str | None], number: int) -> dict[str, Any]:
    part, field = key
    if field is None:
        return config
    if part is None:
        return config | {field: number}
    outer, _, inner = part.partition(".")
    if inner:
        return config | {outer: _stating(dict(config.get(outer) or {}), (inner, field), number)}
    parts = [part, *([f"{part}_dict"] if isinstance(config.get(f"{part}_dict"), dict) else [])]
    return config | {name: dict(config.get(name) or {}) | {field: number} for name in parts}


def write_shards(spans: Mapping[str, TensorSpan], directory: Path, *, max_shard_bytes: int) -> None:
    """Write tensors of other files as a checkpoint's weights, with an index if one file is not enough."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(spans):
        size = spans[name].size_bytes
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
        write_spans(directory / file, {name: spans[name] for name in names})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(span.size_bytes for span in spans.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
