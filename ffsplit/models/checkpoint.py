"""A transformers checkpoint on disk, read from its config and safetensors headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ffsplit.compat.transformers import ReadTensor, names_read
from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.ffn.shapes import FFNShape
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.detection import detect_architecture
from ffsplit.models.family import (
    TEXT,
    Architecture,
    Makes,
    Media,
    Tower,
    activation_name,
    class_named,
    config_part,
)
from ffsplit.models.ffns import FFNPlace, find_ffns, width_groups, without
from ffsplit.models.folder import CONFIG_NAME, ModelFolder, check_no_pointers, local_listing, sort_files
from ffsplit.models.inputs import CLASSIFIERS, DECODERS, GENERATORS
from ffsplit.models.load_options import check_trusted, code_files
from ffsplit.models.names import TensorNames, empty_class
from ffsplit.models.not_a_model import check_is_model, check_modules, check_not_quantized
from ffsplit.models.patterns import base_prefixes, towers_in
from ffsplit.models.tensor_files import (
    ITEM_SIZES,
    TensorInfo,
    digest_files,
    read_headers,
    read_json,
    read_spans,
)

NARROWED = "narrowed"
"""The form of a compressed checkpoint whose FFNs differ from the original's only in width, layer by layer.

Tensors keep the original's names. Their shapes do not match config.json, so loading without ffsplit fails.
"""
PRETRAINED = ("ForMaskedLM", "ForPreTraining")
"""Class name endings of pretraining heads, which encoders are mostly published without."""
WHOLE = ("ForConditionalGeneration", "MTModel")
"""Class name endings of models that have every tower of their family, besides the base model's class."""
FFN_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A readable, supported checkpoint, opened and checked by `open_checkpoint`.

    `ffns` are those that a run compresses. `left_out` stay unchanged: `--only` or `--skip` leave them out, or
    the calibration data does not reach their tower, as with the vision tower of a language model that reads
    text. `read` says how transformers reads each stored name; None if the headers alone tell.
    """

    directory: Path
    config: dict[str, Any]
    architecture: Architecture
    tensors: dict[str, TensorInfo]
    prefix: str
    ffns: tuple[FFNPlace, ...]
    read: Mapping[str, ReadTensor | None] | None = None
    left_out: tuple[FFNPlace, ...] = ()
    given: Media = ()

    @cached_property
    def names(self) -> TensorNames:
        """Maps the names in files (those of `tensors`) to the model's names."""
        return TensorNames(self.tensors, rules=self.architecture.file_names, read=self.read)

    def in_base(self, path: str) -> str:
        """The stored name of a tensor of the base model."""
        return self.names.stored(f"{self.prefix}{path}")

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def class_name(self) -> str:
        """The transformers class it was saved from, or "" if the config does not state it."""
        return class_named(self.config)

    @property
    def is_headless(self) -> bool:
        """Whether it is an encoder without its pretraining head.

        Its config may still name the head's class: sentence-transformers, for one, keeps the name but drops
        the head.
        """
        if not self.class_name.endswith(PRETRAINED):
            return False
        return not self.prefix or all(name.startswith(self.prefix) for name in self.names.modules)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers in its files, whether or not a run compresses them."""
        return tuple(dict.fromkeys(ffn.tower for ffn in self._every_ffn))

    @property
    def _every_ffn(self) -> tuple[FFNPlace, ...]:
        return *self.ffns, *self.left_out

    @property
    def reads(self) -> Media:
        """What a row of its calibration data holds: as given, or the least that its family reads.

        A model with only one of its family's towers reads what that tower reads.
        """
        if self.given:
            return self.given
        return self.architecture.reads if self._alone is None else (self._alone.reads,)

    @property
    def makes(self) -> Makes:
        """What it makes of a row. An encoder alone makes states."""
        return self.architecture.makes if self._alone is None else "states"

    @property
    def _alone(self) -> Tower | None:
        """The encoder, if its files have that tower only of a family with several."""
        several = len(self.architecture.towers) > 1
        if not several or self.architecture.makes not in ("target", "embeddings"):
            return None
        first, *others = (each for each in self.towers if each.name != "vision head")
        return None if others or first.name == "decoder" else first

    @property
    def compared_as(self) -> Makes:
        """Which outputs are compared. With another head, a language model is compared by its states."""
        heads = {"next_tokens": GENERATORS, "target": DECODERS}.get(self.makes, ("",))
        return self.makes if self.class_name.endswith(heads) else "states"

    @property
    def reads_single_texts(self) -> bool:
        """Whether a row is one text, and no more."""
        return self.reads == TEXT and self.makes in ("states", "next_tokens")

    @property
    def reads_jointly(self) -> bool:
        """Whether a row is a text with a picture or sound, or a video: inputs that cannot be made up."""
        return len(self.reads) > 1 or "video" in self.reads

    @property
    def can_heal(self) -> bool:
        return self.architecture.can_heal(self.reads)

    @property
    def can_stream(self) -> bool:
        return self.architecture.can_stream(self.reads)

    @property
    def classifies(self) -> bool:
        """Whether its head returns logits for a whole row."""
        return self.class_name.endswith(CLASSIFIERS)

    @property
    def has_experts(self) -> bool:
        return any(ffn.expert is not None for ffn in self.ffns)

    @property
    def is_guessed(self) -> bool:
        """Whether its family is missing from the table, so its FFNs were found by structure."""
        return self.architecture.model_type not in ARCHITECTURES

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary; 1 if the config does not state it."""
        return int(self.text_config.get("vocab_size") or 1)

    @property
    def is_whole(self) -> bool:
        """Whether it has every tower that its family may have."""
        return set(self.towers) == set(self.architecture.towers)

    @property
    def activation(self) -> str:
        """The activation function of the first FFN, as configs name it."""
        return self.activation_of(0)

    def activation_of(self, index: int) -> str:
        ffn = self.ffns[index]
        return ffn.paths.function or activation_name(self.config, ffn.tower)

    @property
    def max_positions(self) -> int | None:
        """Maximum number of tokens per row; None if the config sets no limit."""
        row = self.architecture
        for config in (self.config, self.text_config):
            positions = config.get(row.positions_field)
            if isinstance(positions, int):
                return positions - row.position_offset
        return None

    @property
    def text_config(self) -> dict[str, Any]:
        """The text part of the config, or the whole config if it has no such part."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config

    @property
    def itemsize(self) -> int:
        """Bytes per element of the FFNs' weights."""
        return ITEM_SIZES[self.tensors[self.ffns[0].down.name].dtype]

    @property
    def shapes(self) -> tuple[FFNShape, ...]:
        return tuple(ffn.shape for ffn in self.ffns)

    @property
    def width_groups(self) -> tuple[int, ...]:
        """A group per FFN, as in `ModelShape.width_groups`."""
        return width_groups(self.ffns, left_out=self.left_out)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of the blocks that have FFNs, below the base model, tower by tower."""
        return tuple(dict.fromkeys(ffn.block for ffn in self.ffns))

    @property
    def unread_blocks(self) -> tuple[str, ...]:
        """Blocks in the files beyond the number that the config states; no model reads them."""
        found: dict[str, None] = {}
        for tower in self.towers:
            if tower.layers_field is None:
                continue
            count = len({ffn.block for ffn in self._every_ffn if ffn.tower == tower})
            number = re.compile(rf"(?:^|.*\.){re.escape(tower.path)}\.(\d+)\.")
            numbers = {int(match[1]) for name in self.tensors if (match := number.match(name))}
            found |= {f"{tower.path}.{each}": None for each in sorted(numbers) if each >= count}
        return tuple(found)

    def block_tensors(self, *blocks: str) -> list[str]:
        """The stored names of these blocks' tensors."""
        starts = tuple(f"{self.prefix}{block}." for block in blocks)
        return [name for module, name in self.names.modules.items() if module.startswith(starts)]

    @cached_property
    def ffn_names(self) -> frozenset[str]:
        """The stored names of all FFNs' tensors."""
        return frozenset(name for ffn in self.ffns for name in ffn.tensor_names)

    @cached_property
    def names_in_blocks(self) -> frozenset[str]:
        """The stored names of the tensors of the blocks that the run is about."""
        return frozenset(self.block_tensors(*self.blocks))

    @cached_property
    def names_in_all_blocks(self) -> frozenset[str]:
        """The same, with the blocks whose FFNs are left out."""
        return frozenset(self.block_tensors(*dict.fromkeys(ffn.block for ffn in self._every_ffn)))

    def model_digest(self) -> str:
        """sha256 over the config, the model's own code and every weight file: 64 hex digits.

        Raises ConfigError when a tensor holds a NaN or an infinity.
        """
        code = code_files(self.directory)
        return digest_files(self.directory, ("config.json", *code, *self.weight_files))

    def tokenizer_digest(self) -> str:
        """sha256 over the files that turn rows into model inputs, or embeddings into results.

        Any file beside the weights may be one of them, whatever its name, except documents.
        """
        return digest_files(self.directory, self.folder.files.digested)

    @cached_property
    def folder(self) -> ModelFolder:
        """The files beside the weights, as they were on first access."""
        return ModelFolder.look_at(self.directory, weights=self.weight_files, is_copy=self._is_copy)

    def _is_copy(self, name: str) -> bool:
        """Whether a safetensors file that the model is not read from holds a copy of its FFNs."""
        try:
            spans = read_spans(self.directory / name)
        except ConfigError:
            return False
        ours = (tensor for ffn in self.ffns for tensor in ffn.tensor_names)
        return any(tensor in spans and spans[tensor].shape == self.tensors[tensor].shape for tensor in ours)


def tokenizer_files(directory: Path) -> tuple[str, ...]:
    """The files that a tokenizer or processor may be made from, sorted by name."""
    return sort_files(local_listing(directory)).digested


def open_checkpoint(
    directory: Path, *, uneven: bool = False, left_out: Collection[str] | None = None, reads: Media = ()
) -> Checkpoint:
    """Read and check a checkpoint's config and headers.

    `uneven` also accepts a NARROWED one. `reads` is what the calibration data holds; (): the least that the
    family reads. `left_out` are the names of FFNs to leave as they are; None: those that it does not reach.

    Raises ConfigError when it is not a safetensors checkpoint or has code that is not trusted, and
    UnsupportedModelError when its FFNs are not where the table says, or its structure shows none.
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
    tensors = read_headers(directory, named=config.get("transformers_weights"))
    architecture = row or detect_architecture(directory, config)
    if not stored:
        check_not_quantized(str(directory), config, tensors)
    read = None
    if row is None or not _headers_tell(row, tensors, config):
        text = json.dumps(config, sort_keys=True)
        read = _read_by_class(directory, tuple(tensors), text, renamed=row is None)
    names = TensorNames(tensors, rules=architecture.file_names, read=read)
    prefix, ffns = find_ffns(architecture, tensors, where=str(directory), names=names, config=config)
    for ffn in ffns:
        for place in ffn.matrices:
            info = tensors.get(place.name)
            if info is None or len(info.shape) != (2 if place.expert is None or place.flat else 3):
                raise UnsupportedModelError(f"{directory}: {place.name} is missing or not a matrix")
            if info.dtype not in FFN_DTYPES:
                raise UnsupportedModelError(
                    f"{directory}: {place.name} is {info.dtype}; FFN weights may be {', '.join(FFN_DTYPES)}"
                )
    _check_config(directory, config, ffns, widths_differ=bool(stored))
    if left_out is None:
        given = reads or architecture.reads
        left_out = [ffn.name for ffn in ffns if not architecture.reaches(ffn.tower, ffn.paths, given)]
    kept, others = without(ffns, left_out), tuple(ffn for ffn in ffns if ffn.name in left_out)
    checkpoint = Checkpoint(directory, config, architecture, tensors, prefix, kept, read, others, reads)
    check_modules(listing, checkpoint.folder.files)
    return checkpoint


@lru_cache(maxsize=8)  # a worker opens one checkpoint for each of its layers
def _read_by_class(
    directory: Path, names: tuple[str, ...], config: str, *, renamed: bool
) -> Mapping[str, ReadTensor | None] | None:
    """How the class that a config names reads stored names; None if transformers has no such class.

    Without `renamed`, stored names are kept, because a row's rules start from them.
    """
    model = empty_class(directory, class_named(json.loads(config)))
    read = None if model is None else names_read(model, names)
    if read is None or renamed:
        return read
    return {name: each and each._replace(renamed=name) for name, each in read.items()}


def _headers_tell(row: Architecture, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Whether headers alone tell which tensors are FFNs that the model runs.

    They do not if there are candidates below several prefixes, or if the files hold towers that the class
    named in the config may lack: a T5 encoder does not read the decoder.
    """
    names = TensorNames(tensors, rules=row.file_names)
    if len(base_prefixes(row, names)) != 1:
        return False
    name = class_named(config)
    has_all = name.lower() in ("", f"{row.model_type}model") or name.endswith(WHOLE)
    return has_all or len(towers_in(row, names)) == 1


def _check_config(
    directory: Path, config: dict[str, Any], ffns: Sequence[FFNPlace], *, widths_differ: bool
) -> None:
    """Raise UnsupportedModelError when sizes in config.json contradict the tensors."""
    for tower in dict.fromkeys(ffn.tower for ffn in ffns if ffn.tower.is_list and ffn.tower.layers_field):
        blocks = {ffn.block for ffn in ffns if ffn.tower == tower}
        stated = config_part(config, tower.config).get(tower.layers_field or "")
        if stated is not None and (not isinstance(stated, int) or stated < len(blocks)):
            raise UnsupportedModelError(
                f"{directory}: config.json says {tower.layers_field} {stated!r}, "
                f"the tensors have {len(blocks)}"
            )
    for ffn in () if widths_differ else ffns:
        part, field = ffn.width_key
        stated = None if field is None else config_part(config, part).get(field)
        width = ffn.shape.num_neurons
        if stated is not None and stated * ffn.paths.width_factor != width:
            raise UnsupportedModelError(
                f"{directory}: config.json says {field} {stated!r}, {ffn.down.name} has {width} columns"
            )
