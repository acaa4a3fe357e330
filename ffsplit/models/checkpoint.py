"""A transformers checkpoint on disk, read from its config and safetensors headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.ffn import FFNShape
from ffsplit.models.architectures import ARCHITECTURES, Architecture

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILE = re.compile(
    r"(tokenizer.*|vocab.*|merges|special_tokens_map|added_tokens|spiece|sentencepiece.*)\.(json|txt|model)$"
    r"|.*\.tiktoken$"
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorInfo(NamedTuple):
    """Where a tensor is and what it looks like; `dtype` in the words of safetensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        return self.num_elements * ITEM_SIZES.get(self.dtype, 4)


class FFNNames(NamedTuple):
    """The tensors of one layer's FFN, as the checkpoint names them; None where it has none."""

    up: str
    gate: str | None
    down: str
    up_bias: str | None
    gate_bias: str | None
    down_bias: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A readable, supported checkpoint. Made by `open_checkpoint`, which checks all of it."""

    directory: Path
    config: dict[str, Any]
    architecture: Architecture
    tensors: dict[str, TensorInfo]
    prefix: str
    num_layers: int

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def class_name(self) -> str:
        """The transformers class it was saved from, or "" when the config does not say."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def activation(self) -> str:
        return str(self.config.get(self.architecture.activation_field, "gelu"))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the FFN's weights."""
        return ITEM_SIZES[self.tensors[self.ffn_names(0).down].dtype]

    def block(self, layer: int) -> str:
        """The path of a block in the base model, as in `encoder.layer.3`."""
        return f"{self.architecture.blocks}.{layer}"

    def ffn_names(self, layer: int) -> FFNNames:
        base = f"{self.prefix}{self.block(layer)}."
        row = self.architecture

        def bias(path: str | None) -> str | None:
            name = f"{base}{path}.bias"
            return name if path is not None and name in self.tensors else None

        return FFNNames(
            up=f"{base}{row.up}.weight",
            gate=None if row.gate is None else f"{base}{row.gate}.weight",
            down=f"{base}{row.down}.weight",
            up_bias=bias(row.up),
            gate_bias=bias(row.gate),
            down_bias=bias(row.down),
        )

    def ffn_shape(self, layer: int) -> FFNShape:
        names = self.ffn_names(layer)
        hidden_size, num_neurons = self.tensors[names.down].shape
        return FFNShape(
            num_neurons=num_neurons,
            hidden_size=hidden_size,
            gated=names.gate is not None,
            up_bias=names.up_bias is not None,
            down_bias=names.down_bias is not None,
        )

    @property
    def shapes(self) -> tuple[FFNShape, ...]:
        return tuple(self.ffn_shape(layer) for layer in range(self.num_layers))

    @cached_property
    def license(self) -> str | None:
        """The licence that the model card's front matter names."""
        card = self.directory / "README.md"
        if not card.is_file():
            return None
        found = re.search(
            r"\A---\n.*?^license:\s*[\"']?([\w.\-]+)", card.read_text("utf-8", "replace"), re.S | re.M
        )
        return found.group(1) if found else None

    def model_digest(self) -> str:
        """sha256 over the config and every weight file: 64 hex digits."""
        return _digest_files(self.directory, ("config.json", *self.weight_files))

    def tokenizer_digest(self) -> str:
        return _digest_files(self.directory, tokenizer_files(self.directory))


def tokenizer_files(directory: Path) -> tuple[str, ...]:
    """The files a tokenizer is made from, sorted by name."""
    return tuple(sorted(path.name for path in directory.iterdir() if TOKENIZER_FILE.match(path.name)))


def _digest_files(directory: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{(directory / name).stat().st_size}\0".encode())
        with (directory / name).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check a checkpoint's config and headers.

    Raises ConfigError when it is not a safetensors checkpoint, and UnsupportedModelError when its
    family is not in the table or its tensors are not where the table says.
    """
    config = _read_json(directory / "config.json", f"{directory} is not a model: it has no config.json")
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"{directory}: model type {model_type!r} is not supported (known: {known})"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{directory} is already compressed or quantized: start from the original"
        )
    architecture = ARCHITECTURES[model_type]
    tensors = _read_headers(directory)
    tail = f"{architecture.blocks}.0.{architecture.down}.weight"
    first = [name for name in tensors if name == tail or name.endswith(f".{tail}")]
    if len(first) != 1:
        raise UnsupportedModelError(
            f"{directory}: no tensor {tail!r}, where a {model_type} keeps its first FFN"
        )
    prefix = first[0].removesuffix(tail)
    num_layers = 0
    while f"{prefix}{architecture.blocks}.{num_layers}.{architecture.down}.weight" in tensors:
        num_layers += 1
    checkpoint = Checkpoint(directory, config, architecture, tensors, prefix, num_layers)
    for layer in range(num_layers):
        names = checkpoint.ffn_names(layer)
        for name in (names.up, names.gate, names.down):
            if name is not None and (name not in tensors or len(tensors[name].shape) != 2):
                raise UnsupportedModelError(f"{directory}: {name} is missing or is no matrix")
    return checkpoint


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(missing)
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _read_headers(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map: dict[str, str] = _read_json(index, "").get("weight_map") or {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map")
        files = sorted(set(weight_map.values()))
    elif (directory / "model.safetensors").is_file():
        weight_map, files = {}, ["model.safetensors"]
    elif any(path.suffix in PICKLE_SUFFIXES for path in directory.iterdir()):
        raise ConfigError(
            f"{directory} holds only pickled weights, which can run code: convert them to safetensors "
            "with save_pretrained"
        )
    else:
        raise ConfigError(f"{directory} has no model.safetensors and no {INDEX_NAME}")
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        with opened(directory / name) as file:
            for tensor in file.keys():  # noqa: SIM118
                view = file.get_slice(tensor)
                tensors[tensor] = TensorInfo(name, view.get_dtype(), tuple(view.get_shape()))
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise ConfigError(f"{index} names {absent[0]}, which {weight_map[absent[0]]} does not hold")
    return tensors


@contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors file, memory-mapped. Raises ConfigError when it is missing or truncated."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a whole safetensors file: {error}") from None
