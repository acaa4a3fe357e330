"""A transformers checkpoint on disk, read from its config and safetensors headers alone."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ffsplit.errors import UnsupportedModelError
from ffsplit.ffn import FFNShape
from ffsplit.models.architectures import ARCHITECTURES, Architecture
from ffsplit.models.headers import ITEM_SIZES, TensorInfo, read_headers, read_json

FFN_DTYPES = ("F32", "F16", "BF16")
TOKENIZER_FILE = re.compile(
    r"(tokenizer.*|vocab.*|merges|special_tokens_map|added_tokens|spiece|sentencepiece.*)\.(json|txt|model)$"
    r"|.*\.tiktoken$"
)


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
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def class_name(self) -> str:
        """The transformers class it was saved from, or "" when the config does not say."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def activation(self) -> str:
        row = self.architecture
        return str(self.config.get(row.activation_field, row.default_activation))

    @property
    def max_positions(self) -> int | None:
        """The most tokens that a row may have; None where the config sets no limit."""
        positions = self.config.get("max_position_embeddings")
        return positions - self.architecture.position_offset if isinstance(positions, int) else None

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
        front = re.match(r"---\n(.*?\n)---\s*$", card.read_text("utf-8", "replace"), re.S | re.M)
        try:
            fields = yaml.safe_load(front.group(1)) if front else None
        except yaml.YAMLError:
            return None
        named = fields.get("license") if isinstance(fields, dict) else None
        return ", ".join(map(str, named)) if isinstance(named, list) else str(named) if named else None

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
    config = read_json(directory / "config.json", f"{directory} is not a model: it has no config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"{directory}: model type {model_type!r} is not supported (known: {known})"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{directory} is already compressed or quantized: start from the original"
        )
    architecture = ARCHITECTURES[model_type]
    tensors = read_headers(directory)
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
    width = tensors[first[0]].shape[-1]
    num_layers = _stated(directory, config, architecture.layers_field, found=num_layers)
    if _stated(directory, config, architecture.width_field, found=width) != width:
        raise UnsupportedModelError(
            f"{directory}: {first[0]} has {width} columns, config.json says otherwise"
        )
    checkpoint = Checkpoint(directory, config, architecture, tensors, prefix, num_layers)
    for layer in range(num_layers):
        names = checkpoint.ffn_names(layer)
        for name in (names.up, names.gate, names.down):
            if name is not None and (name not in tensors or len(tensors[name].shape) != 2):
                raise UnsupportedModelError(f"{directory}: {name} is missing or is no matrix")
            if name is not None and tensors[name].dtype not in FFN_DTYPES:
                raise UnsupportedModelError(
                    f"{directory}: {name} is {tensors[name].dtype}; FFNs may be {', '.join(FFN_DTYPES)}"
                )
    return checkpoint


def _stated(directory: Path, config: dict[str, Any], field: str, *, found: int) -> int:
    """A size as config.json states it, which may be more than was found, not less."""
    stated = config.get(field, found)
    if not isinstance(stated, int) or stated < found:
        raise UnsupportedModelError(
            f"{directory}: config.json says {field} {stated!r}, the tensors say {found}"
        )
    return stated
