"""A transformers checkpoint on disk, read from its config and safetensors headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ffsplit.compat.transformers import ReadTensor, names_read
from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.ffn.activations import OTHER_NAMES
from ffsplit.ffn.shapes import FFNShape
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.detect import detect_architecture
from ffsplit.models.find import FFNPlace, base_prefixes, config_part, find_ffns, towers_in
from ffsplit.models.folder import CONFIG_NAME, ModelFolder, check_no_pointers, local_listing, sort_files
from ffsplit.models.load_options import check_trusted, code_files
from ffsplit.models.names import TensorNames, empty_class
from ffsplit.models.recognise import check_is_model, check_modules, check_not_quantized
from ffsplit.models.rows import Architecture, ModelKind, Tower
from ffsplit.models.tensor_files import (
    ITEM_SIZES,
    TensorInfo,
    digest_files,
    read_headers,
    read_json,
    read_spans,
)

GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes end that give a distribution over the next token."""
CLASSIFIERS = ("ForSequenceClassification",)
"""How the classes end whose head reads one state of a row and gives its logits."""
NARROWED = "narrowed"
"""The form of a checkpoint of this package whose FFNs are the original's but for widths that differ.

Its tensors have the original's names. That their shapes do not match config.json makes a load without
ffsplit fail.
"""
PRETRAINED = ("ForMaskedLM", "ForPreTraining")
"""How the classes end whose head an encoder was pretrained with, and is mostly published without."""
WHOLE = ("ForConditionalGeneration", "MTModel")
"""How the classes end that have every tower of their family, beside the base model's class."""
FFN_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A readable, supported checkpoint. Made by `open_checkpoint`, which checks all of it.

    `read` is what transformers makes of the tensors' names, where the headers alone did not tell.
    """

    directory: Path
    config: dict[str, Any]
    architecture: Architecture
    tensors: dict[str, TensorInfo]
    prefix: str
    ffns: tuple[FFNPlace, ...]
    read: Mapping[str, ReadTensor | None] | None = None

    @cached_property
    def names(self) -> TensorNames:
        """What the model calls the tensors that it reads, whose names in files are those of `tensors`."""
        return TensorNames(self.tensors, rules=self.architecture.file_names, read=self.read)

    def in_base(self, path: str) -> str:
        """The stored name of a tensor of the base model."""
        return self.names.stored(f"{self.prefix}{path}")

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
        return class_named(self.config)

    @property
    def is_headless(self) -> bool:
        """Whether it is an encoder without the head that it was pretrained with.

        Its config may name that head's class all the same: sentence-transformers, for one, keeps the name
        and not the head.
        """
        if not self.class_name.endswith(PRETRAINED):
            return False
        return not self.prefix or all(name.startswith(self.prefix) for name in self.names.modules)

    @property
    def kind(self) -> ModelKind:
        """What it reads: a model that has one tower of its family's two reads what that tower does."""
        towers = {ffn.tower.name for ffn in self.ffns}
        alone: dict[ModelKind, dict[str, ModelKind]] = {
            "seq2seq": {"encoder": "encoder"},
            "speech": {"encoder": "audio"},
            "image_text": {"text": "encoder", "vision": "image"},
        }
        family = self.architecture.kind
        first, *others = sorted(towers - {"vision head"})
        return family if others else alone.get(family, {}).get(first, family)

    @property
    def compared_as(self) -> ModelKind:
        """What its outputs are compared as: a causal LM with another head by its hidden states."""
        if self.kind != "causal_lm" or self.class_name.endswith(GENERATORS):
            return self.kind
        return "encoder"

    @property
    def classifies(self) -> bool:
        """Whether its head gives logits of a whole row of text."""
        return self.kind in ("encoder", "causal_lm") and self.class_name.endswith(CLASSIFIERS)

    @property
    def has_experts(self) -> bool:
        return any(ffn.expert is not None for ffn in self.ffns)

    @property
    def is_guessed(self) -> bool:
        """Whether its family is not in the table, so that its FFNs were found by structure."""
        return self.architecture.model_type not in ARCHITECTURES

    @property
    def vocab_size(self) -> int:
        """How many tokens its text side reads; 1 where the config does not say."""
        return int(self.text_config.get("vocab_size") or 1)

    @property
    def is_whole(self) -> bool:
        """Whether it has every tower that its family may have."""
        return {ffn.tower for ffn in self.ffns} == set(self.architecture.towers)

    @property
    def activation(self) -> str:
        """The activation function of the first FFN, by the name that configs give it."""
        return self.activation_of(0)

    def activation_of(self, index: int) -> str:
        return activation_name(self.config, self.ffns[index].tower)

    @property
    def max_positions(self) -> int | None:
        """The most tokens that a row may have; None where the config sets no limit."""
        row = self.architecture
        for config in (self.config, self.text_config):
            positions = config.get(row.positions_field)
            if isinstance(positions, int):
                return positions - row.position_offset
        return None

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that is about text: all of it where it has no such part."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the FFN's weights."""
        return ITEM_SIZES[self.tensors[self.ffns[0].down.name].dtype]

    @property
    def shapes(self) -> tuple[FFNShape, ...]:
        return tuple(ffn.shape for ffn in self.ffns)

    @property
    def width_groups(self) -> tuple[int, ...]:
        """FFNs of one group have one width, which the config states; -1: no config can state it."""
        keys = list(dict.fromkeys(ffn.width_key for ffn in self.ffns))
        return tuple(-1 if ffn.paths.width_field is None else keys.index(ffn.width_key) for ffn in self.ffns)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of the blocks that have FFNs, below the base model, tower by tower."""
        return tuple(dict.fromkeys(ffn.block for ffn in self.ffns))

    @property
    def unread_blocks(self) -> tuple[str, ...]:
        """Blocks that the files hold beyond those that the config states: no model reads them."""
        found: dict[str, None] = {}
        for tower in dict.fromkeys(ffn.tower for ffn in self.ffns if ffn.tower.is_list):
            count = len({ffn.block for ffn in self.ffns if ffn.tower == tower})
            number = re.compile(rf"(?:^|.*\.){re.escape(tower.path)}\.(\d+)\.")
            numbers = {int(match[1]) for name in self.tensors if (match := number.match(name))}
            found |= {f"{tower.path}.{each}": None for each in sorted(numbers) if each >= count}
        return tuple(found)

    def block_tensors(self, *blocks: str) -> list[str]:
        """The tensors of some blocks."""
        starts = tuple(f"{self.prefix}{block}." for block in blocks)
        return [name for module, name in self.names.modules.items() if module.startswith(starts)]

    @cached_property
    def ffn_names(self) -> frozenset[str]:
        """The tensors of all FFNs."""
        return frozenset(name for ffn in self.ffns for name in ffn.tensor_names)

    @cached_property
    def names_in_blocks(self) -> frozenset[str]:
        """The tensors of all blocks."""
        return frozenset(self.block_tensors(*self.blocks))

    @cached_property
    def license(self) -> str | None:
        """The licence that the model card's front matter names."""
        card = self.directory / "README.md"
        if not card.is_file():
            return None
        front = re.match(r"---\n(.*?\n)---\s*$", card.read_text("utf-8", "replace"), re.S | re.M)
        try:
            fields = yaml.safe_load(front.group(1)) if front else None
        except Exception:  # a card is for people: what is no YAML there names no licence
            return None
        named = fields.get("license") if isinstance(fields, dict) else None
        return ", ".join(map(str, named)) if isinstance(named, list) else str(named) if named else None

    def model_digest(self) -> str:
        """sha256 over the config, the model's own code and every weight file: 64 hex digits.

        Raises ConfigError when a tensor holds a NaN or an infinity.
        """
        code = code_files(self.directory)
        return digest_files(self.directory, ("config.json", *code, *self.weight_files))

    def tokenizer_digest(self) -> str:
        """sha256 over whatever turns rows into the model's inputs, or embeddings into a result.

        Any file beside the weights may be a part of that, whatever its name, but for documents.
        """
        return digest_files(self.directory, self.folder.files.digested)

    @cached_property
    def folder(self) -> ModelFolder:
        """What lies beside the weights, as it is when first asked for."""
        return ModelFolder.look_at(self.directory, weights=self.weight_files, is_copy=self._is_copy)

    def _is_copy(self, name: str) -> bool:
        """Whether a safetensors file that is not read holds FFNs of this model all the same."""
        try:
            spans = read_spans(self.directory / name)
        except ConfigError:
            return False
        ours = (tensor for ffn in self.ffns for tensor in ffn.tensor_names)
        return any(tensor in spans and spans[tensor].shape == self.tensors[tensor].shape for tensor in ours)


def tokenizer_files(directory: Path) -> tuple[str, ...]:
    """The files that a tokenizer or processor may be made from, sorted by name."""
    return sort_files(local_listing(directory)).digested


def open_checkpoint(directory: Path, *, uneven: bool = False) -> Checkpoint:
    """Read and check a checkpoint's config and headers.

    `uneven` takes a NARROWED one too. Raises ConfigError when it is not a safetensors checkpoint or brings
    code that is not trusted, and UnsupportedModelError when its family is not in the table or its tensors
    are not where the table says.
    """
    listing = local_listing(directory)
    check_is_model(listing)
    check_no_pointers(directory, sort_files(listing).wanted)
    config = read_json(directory / CONFIG_NAME, f"{directory} is not a model: it has no config.json")
    check_trusted(directory)
    model_type = config.get("model_type")
    stored = config.get("quantization_config")
    if stored and not (uneven and stored.get("form") == NARROWED):
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        found = f"{method or 'quantization_config'} in config.json"
        raise UnsupportedModelError(
            f"{directory} is already compressed or quantized ({found}): start from the original"
        )
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    architecture = row or detect_architecture(directory, config)
    tensors = read_headers(directory, named=config.get("transformers_weights"))
    if not stored:
        check_not_quantized(str(directory), config, tensors)
    read = None
    if row is None or not _headers_tell(row, tensors, config):
        read = _read_by_class(directory, tensors, config, renamed=row is None)
    names = TensorNames(tensors, rules=architecture.file_names, read=read)
    prefix, ffns = find_ffns(architecture, tensors, where=str(directory), names=names, config=config)
    for ffn in ffns:
        for place in ffn.matrices:
            info = tensors.get(place.name)
            if info is None or len(info.shape) != (2 if place.expert is None else 3):
                raise UnsupportedModelError(f"{directory}: {place.name} is missing or is no matrix")
            if info.dtype not in FFN_DTYPES:
                raise UnsupportedModelError(
                    f"{directory}: {place.name} is {info.dtype}; FFNs may be {', '.join(FFN_DTYPES)}"
                )
    _check_config(directory, config, ffns, widths_differ=bool(stored))
    checkpoint = Checkpoint(directory, config, architecture, tensors, prefix, ffns, read)
    check_modules(listing, checkpoint.folder.files)
    return checkpoint


def _read_by_class(
    directory: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], *, renamed: bool
) -> dict[str, ReadTensor | None] | None:
    """What the class that a config names makes of stored names, where transformers has such a class.

    Without `renamed` stored names stay as they are: the rules of a row begin with those.
    """
    model = empty_class(directory, class_named(config))
    read = None if model is None else names_read(model, tensors)
    if read is None or renamed:
        return read
    return {name: each and each._replace(renamed=name) for name, each in read.items()}


def class_named(config: Mapping[str, Any]) -> str:
    """The class that a config was saved by, or ""."""
    return str((config.get("architectures") or [""])[0])


def _headers_tell(row: Architecture, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Whether headers alone say which tensors are FFNs that the model runs.

    They do not where there are candidates below several prefixes, or where files hold towers that the
    class named in the config may lack: a T5 encoder reads nothing of a decoder.
    """
    names = TensorNames(tensors, rules=row.file_names)
    if len(base_prefixes(row, names)) != 1:
        return False
    name = class_named(config)
    has_all = name.lower() in ("", f"{row.model_type}model") or name.endswith(WHOLE)
    return has_all or len(towers_in(row, names)) == 1


def activation_name(config: Mapping[str, Any], tower: Tower) -> str:
    """What a tower's part of a config calls its activation function."""
    field = tower.activation_field
    stated = config_part(config, tower.config).get(field) if field else None
    name = str(stated or tower.default_activation)
    return OTHER_NAMES.get(name, name)


def _check_config(
    directory: Path, config: dict[str, Any], ffns: Sequence[FFNPlace], *, widths_differ: bool
) -> None:
    """Raise UnsupportedModelError where config.json states other sizes than the tensors have."""
    for tower in dict.fromkeys(ffn.tower for ffn in ffns if ffn.tower.is_list):
        blocks = {ffn.block for ffn in ffns if ffn.tower == tower}
        stated = config_part(config, tower.config).get(tower.layers_field)
        if stated is not None and (not isinstance(stated, int) or stated < len(blocks)):
            raise UnsupportedModelError(
                f"{directory}: config.json says {tower.layers_field} {stated!r}, "
                f"the tensors say {len(blocks)}"
            )
    for ffn in () if widths_differ else ffns:
        part, field = ffn.width_key
        stated = None if field is None else config_part(config, part).get(field)
        width = ffn.shape.num_neurons
        if stated is not None and stated != width:
            raise UnsupportedModelError(
                f"{directory}: config.json says {field} {stated!r}, {ffn.down.name} has {width} columns"
            )
