"""From the original checkpoint and the compressed layers to a checkpoint that transformers loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffsplit.compressors.base import OutputNorm
from ffsplit.compressors.weights import FFNPart, FFNWeights, LinearMap
from ffsplit.ffn import LayerLayout, is_stock_form
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.headers import INDEX_NAME, opened
from ffsplit.models.tensor_files import TensorSpan, read_spans, write_spans

MAX_SHARD_BYTES = 5 * 10**9
COMPANIONS = re.compile(r".*\.(json|txt|model|tiktoken|jinja)$|(LICEN[CS]E|NOTICE).*")
"""Files beside the weights that an artifact keeps: configs, tokenizers, licences."""


def is_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether stock modelling code can load it: one width for all layers, dense, no added bias."""
    return is_stock_form(layouts, checkpoint.shapes)


def load_ffn(checkpoint: Checkpoint, layer: int, *, activation: Any, device: torch.device) -> FFNWeights:
    """One layer's dense FFN in float32, read from its tensors alone."""
    names = checkpoint.ffn_names(layer)

    def tensor(name: str | None) -> Tensor | None:
        return None if name is None else _read_float(checkpoint, name, device=device)

    def linear(weight: str, bias: str | None) -> LinearMap:
        loaded = tensor(weight)
        assert loaded is not None
        return LinearMap.dense(loaded, tensor(bias))

    part = FFNPart(
        neurons=torch.arange(checkpoint.ffn_shape(layer).num_neurons),
        up=linear(names.up, names.up_bias),
        gate=None if names.gate is None else linear(names.gate, names.gate_bias),
        down=linear(names.down, None),
    )
    return FFNWeights(heavy=part, light=None, down_bias=tensor(names.down_bias), activation=activation)


def load_output_norm(checkpoint: Checkpoint, layer: int, *, device: torch.device) -> OutputNorm | None:
    """The layer norm of x + FFN(x), in float32, where the family has one."""
    path = checkpoint.architecture.output_norm
    base = f"{checkpoint.prefix}{checkpoint.block(layer)}.{path}"
    if path is None or f"{base}.weight" not in checkpoint.tensors:
        return None
    weight, bias = (_read_float(checkpoint, f"{base}.{name}", device=device) for name in ("weight", "bias"))
    return OutputNorm(weight, bias, eps=float(checkpoint.config.get("layer_norm_eps", 1e-12)))


def _read_float(checkpoint: Checkpoint, name: str, *, device: torch.device) -> Tensor:
    with opened(checkpoint.directory / checkpoint.tensors[name].file, "pt") as file:
        tensor: Tensor = file.get_tensor(name).to(device=device, dtype=torch.float32)
        return tensor


def layer_tensors(
    checkpoint: Checkpoint, layer: int, weights: FFNWeights, *, plain: bool
) -> dict[str, Tensor]:
    """A compressed layer's tensors under the names that the artifact gives them, in the original's dtype."""
    names = checkpoint.ffn_names(layer)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[
        checkpoint.tensors[names.down].dtype
    ]
    if plain:
        tensors = _plain_tensors(checkpoint, layer, weights)
    else:
        row = checkpoint.architecture
        base = f"{checkpoint.prefix}{checkpoint.block(layer)}.{row.split_path}."
        tensors = {base + name: tensor for name, tensor in _split_tensors(weights)}
        tensors[base + row.guard] = torch.zeros(1)
    kept = (torch.int8, torch.uint8, torch.float16)  # integers and their scales stay what they are
    return {
        name: (tensor.cpu() if tensor.dtype in kept else tensor.to("cpu", dtype)).contiguous()
        for name, tensor in tensors.items()
    }


def _plain_tensors(checkpoint: Checkpoint, layer: int, weights: FFNWeights) -> dict[str, Tensor]:
    names, (part,) = checkpoint.ffn_names(layer), weights.parts
    tensors = {
        names.up: part.up.weight,
        names.gate: None if part.gate is None else part.gate.weight,
        names.down: part.down.weight,
        names.up_bias: part.up.bias,
        names.gate_bias: None if part.gate is None else part.gate.bias,
        names.down_bias: weights.down_bias,
    }
    return {name: tensor for name, tensor in tensors.items() if name is not None and tensor is not None}


def _split_tensors(weights: FFNWeights) -> Iterator[tuple[str, Tensor]]:
    for role, part in (("heavy", weights.heavy), ("light", weights.light)):
        if part is None:
            continue
        for path, linear in (("up", part.up), ("gate", part.gate), ("down", part.down)):
            if linear is None:
                continue
            for name, tensor in linear.tensors.items():
                yield f"{role}.{path}.{name}", tensor
            if linear.bias is not None:
                yield f"{role}.{path}.bias", linear.bias
    if weights.down_bias is not None:
        yield "down_bias", weights.down_bias


def assemble(
    checkpoint: Checkpoint,
    layer_files: Sequence[Path],
    layouts: Sequence[LayerLayout],
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    linears: dict[str, Any] | None = None,
) -> None:
    """Write the checkpoint: every tensor that is no FFN's as it was, the compressed layers beside them.

    Tensors of `layer_files` go before the original's of the same name; `linears` is what the config says
    of those that are attention's.

    Bytes are copied from file to file in small pieces, so neither model nor shard is ever in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    replaced = {
        name for layer in range(checkpoint.num_layers) for name in checkpoint.ffn_names(layer) if name
    }
    spans: dict[str, TensorSpan] = {}
    for file in checkpoint.weight_files:
        spans |= read_spans(checkpoint.directory / file)
    spans = {name: spans[name] for name in checkpoint.tensors if name not in replaced}
    for path in layer_files:
        spans |= read_spans(path)
    _write_shards(spans, directory, max_shard_bytes=max_shard_bytes)
    config = artifact_config(checkpoint, layouts, linears=linears)
    _copy_companions(checkpoint.directory, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def replace_weights(directory: Path, replacements: Path) -> None:
    """Rewrite a checkpoint in place with the tensors of another file under the same names."""
    new = read_spans(replacements)
    for path in sorted(directory.glob("*.safetensors")):
        rewritten = path.with_suffix(".rewritten")
        write_spans(rewritten, {name: new.get(name, span) for name, span in read_spans(path).items()})
        rewritten.replace(path)


def artifact_config(
    checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, linears: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The original's config with the new width, or with the layout of every layer."""
    config = dict(checkpoint.config)
    if is_plain(checkpoint, layouts) and linears is None:
        config[checkpoint.architecture.width_field] = layouts[0].num_neurons
    else:
        config["quantization_config"] = {
            "quant_method": "ffsplit",
            "version": 1,
            "layers": [layout.model_dump(mode="json") for layout in layouts],
            "shapes": [shape.model_dump(mode="json") for shape in checkpoint.shapes],
        }
        if linears is not None:  # which readers of version 1 would pass over
            config["quantization_config"] |= {"version": 2, "linears": linears}
    return config


def _write_shards(spans: Mapping[str, TensorSpan], directory: Path, *, max_shard_bytes: int) -> None:
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
