"""A checkpoint's integer matrices, as the family's own modules would hold them.

For exports to software that has no code for split FFNs. The integers and scales of a compressed checkpoint
are carried over exactly. Those of a checkpoint in floating point are made here, by rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffsplit.compat.transformers import names_read
from ffsplit.errors import ConfigError
from ffsplit.ffn.quantization import parted, quantize_rows, scales_of, unpack_nibbles
from ffsplit.ffn.shapes import Format, Integer, LayerLayout, LowRank, is_stock_form
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.detection import architecture_of
from ffsplit.models.family import class_named
from ffsplit.models.ffns import FFNPlace, ffns_of, width_groups
from ffsplit.models.names import TensorNames, empty_class
from ffsplit.models.tensor_files import TensorSpan, opened, read_headers, read_spans
from ffsplit.runtime.assemble import with_width
from ffsplit.runtime.ffn_tensors import FFNRun, joined_halves
from ffsplit.runtime.plugin import SplitConfig, paired

GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale, where weights are rounded here: the first that divides a row."""
FEWEST_COLUMNS = GROUP_SIZES[-1]
"""Servers have no kernels for smaller groups."""


class Grid(NamedTuple):
    """A matrix in integers, int8 [rows, columns], with scales, bfloat16 [rows, groups]."""

    format: Integer
    integers: Tensor
    scales: Tensor


class Piece(NamedTuple):
    """Matrices by the names of their weights in files, and the tensors that go with them."""

    grids: dict[str, Grid]
    others: dict[str, Tensor]


@dataclass(frozen=True)
class StockMatrices:
    """A checkpoint whose matrices are to be integers in the family's own modules.

    `config` states the FFNs' width, and no quantization. `pieces` are read when they are asked for; `spans`
    are the tensors that stay as they are. `paths` are the modules of the matrices below the base model,
    which begins with `prefix` in the class that the config names.
    """

    config: dict[str, Any]
    prefix: str
    paths: dict[str, str]
    """By the names of their weights in files."""
    ffn_formats: frozenset[Integer]
    pieces: Iterator[Piece]
    spans: dict[str, TensorSpan]


def empty_stock_model(directory: Path, config: dict[str, Any]) -> Any:
    """The model of a directory's config, without weights. Raises ConfigError if its class is not stock."""
    model = empty_class(directory, class_named(config))
    if model is None:
        raise ConfigError(
            f"{directory} has a class of its own, {class_named(config)}: only transformers' can be exported"
        )
    return model


def _check_linear(ffns: Sequence[FFNPlace]) -> None:
    """Raise ConfigError for FFNs that are not made of linear layers."""
    for ffn in ffns:
        if ffn.expert is not None or ffn.paths.transposed:
            kind = "an expert" if ffn.expert is not None else "stored transposed"
            raise ConfigError(
                f"{ffn.name} is {kind}: only FFNs of linear layers can be exported to compressed-tensors"
            )


def _indivisible(what: str, columns: int) -> ConfigError:
    return ConfigError(
        f"{what} has rows of {columns}, which groups of {FEWEST_COLUMNS} weights or more do not divide: "
        "compress with --width-multiple 64"
    )


def _spans(directory: Path, files: Sequence[str]) -> dict[str, TensorSpan]:
    return {name: span for file in files for name, span in read_spans(directory / file).items()}


# From a checkpoint in floating point.


def rounded_matrices(directory: Path, *, num_bits: int, grouped: bool) -> StockMatrices:
    """The FFNs of a checkpoint in floating point, rounded to nearest.

    One scale per row, or, `grouped`, per 128 columns, or 64 or 32 where 128 do not divide a row.
    """
    checkpoint = open_checkpoint(directory)
    _check_linear(checkpoint.ffns)
    names = tuple(dict.fromkeys(place.name for ffn in checkpoint.ffns for place in ffn.matrices))
    modules = {stored: module for module, stored in checkpoint.names.modules.items()}
    formats = {}
    for name in names:
        columns = checkpoint.tensors[name].shape[1]
        size = next((size for size in GROUP_SIZES if columns % size == 0), None) if grouped else None
        if grouped and size is None:
            raise _indivisible(name, columns)
        formats[name] = Integer.model_validate({"num_bits": num_bits, "group_size": size})

    def piece(name: str) -> Piece:
        with opened(directory / checkpoint.tensors[name].file, "pt") as file:
            weight = file.get_tensor(name).float()
        options: dict[str, Any] = {"num_bits": num_bits, "group_size": formats[name].group_size}
        scales = scales_of(weight, **options)
        integers = _unpacked(quantize_rows(weight, scales, **options)["weight"], columns=weight.shape[1])
        return Piece({name: Grid(formats[name], integers, scales)}, {})

    spans = _spans(directory, checkpoint.weight_files)
    return StockMatrices(
        config={name: value for name, value in checkpoint.config.items() if name != "transformers_weights"},
        prefix=ffns_of(empty_stock_model(directory, checkpoint.config))[0],
        paths={name: modules[name].removeprefix(checkpoint.prefix).removesuffix(".weight") for name in names},
        ffn_formats=frozenset(formats.values()),
        pieces=map(piece, names),
        spans={name: spans[name] for name in checkpoint.tensors if name not in names},
    )


def _unpacked(stored: Tensor, *, columns: int) -> Tensor:
    return unpack_nibbles(stored, columns) if stored.dtype == torch.uint8 else stored


# From a compressed checkpoint.


def stored_matrices(directory: Path, config: dict[str, Any]) -> StockMatrices:
    """The matrices of a compressed checkpoint, as they are stored.

    Raises ConfigError if an FFN is not one part of integers, or the family's modules cannot hold it.
    """
    settings = SplitConfig(**config["quantization_config"])
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    reader = _Reader(directory, config, settings)
    for ffn, run in reader.ffns:
        config = with_width(config, ffn, run.layout.num_neurons)
    return StockMatrices(
        config=config,
        prefix=reader.prefix,
        paths=reader.paths(),
        ffn_formats=frozenset(
            _held(format, columns)
            for _, run in reader.ffns
            for format, _, columns in _stored_maps(run).values()
        ),
        pieces=reader.pieces(),
        spans=reader.spans_besides(),
    )


class _Reader:
    """Reads the integers of a compressed checkpoint."""

    def __init__(self, directory: Path, config: dict[str, Any], settings: SplitConfig) -> None:
        self._model = empty_stock_model(directory, config)
        self.prefix, places, runs = paired(self._model, settings.runs, left_out=settings.left_out)
        _check_linear(places)
        kept = {ffn.name for ffn in places}
        _check_layouts(
            places, runs, left_out=[each for each in ffns_of(self._model)[1] if each.name not in kept]
        )
        self.ffns = list(zip(places, runs, strict=True))
        self._linears: Sequence[str] = (settings.linears or {}).get("modules", ())
        self._linear_format = Integer.model_validate((settings.linears or {}).get("format", {"num_bits": 8}))
        tensors = read_headers(directory)
        self._spans = _spans(directory, sorted({info.file for info in tensors.values()}))
        row = ARCHITECTURES.get(str(config.get("model_type")))
        self._names = TensorNames(
            tensors,
            rules=architecture_of(self._model).file_names,
            read=names_read(self._model, tensors) if row is None else None,
        )
        first = f"{self.prefix}{places[0].split_prefix}."
        has_prefix = any(name.startswith(first) for name in tensors)
        self._file_prefix = self.prefix if has_prefix else ""
        """A base model may be stored alone, while the config names a class with a head."""

    def _path(self, name: str) -> str:
        """A module's path below the base model, by the name of its weight in the model."""
        return name.removeprefix(self.prefix).removesuffix(".weight")

    def _stored(self, name: str) -> str:
        """The name in files of a tensor of the model."""
        return self._names.stored(self._file_prefix + name.removeprefix(self.prefix))

    def paths(self) -> dict[str, str]:
        """The modules of the matrices, by the names of their weights in files."""
        names = [place.name for ffn, _ in self.ffns for place in ffn.matrices]
        names += [f"{self.prefix}{path}.weight" for path in self._linears]
        return {self._stored(name): self._path(name) for name in names}

    def spans_besides(self) -> dict[str, TensorSpan]:
        """All tensors except the FFNs' and the matrices."""
        bases = {f"{self._file_prefix}{ffn.split_prefix}." for ffn, _ in self.ffns}
        gone = {self._stored(f"{self.prefix}{path}.weight") for path in self._linears}
        gone |= {self._file_prefix + ffn.guard for ffn, _ in self.ffns}
        gone |= {f"{base}down_bias" for base in bases}
        parts = tuple(f"{base}{role}." for base in bases for role in ("heavy", "light"))
        return {
            name: span
            for name, span in self._spans.items()
            if name not in gone and not name.startswith(parts)
        }

    def pieces(self) -> Iterator[Piece]:
        for ffn, run in self.ffns:
            yield self._ffn(ffn, run)
        for path in self._linears:
            name = self._stored(f"{self.prefix}{path}.weight")
            rows, columns = self._model.get_submodule(f"{self.prefix}{path}").weight.shape
            yield Piece({name: self._grid(name, self._linear_format, rows, columns)}, {})

    def _ffn(self, ffn: FFNPlace, run: FFNRun) -> Piece:
        """An FFN's matrices and biases."""
        role = "heavy" if run.layout.heavy is not None else "light"
        base = f"{self._file_prefix}{ffn.split_prefix}."
        grids: dict[str, Grid] = {}
        biases: dict[str, Tensor] = {}
        for name, map in _stored_maps(run).items():
            grids[name] = self._grid(f"{base}{role}.{name}.weight", *map)
            if run.shape.up_bias and name != "down":
                biases[name] = self._tensor(f"{base}{role}.{name}.bias")
        if "gate_up" in grids:
            format, integers, scales = grids["gate_up"]
            halves = zip(integers.chunk(2), scales.chunk(2), strict=True)
            grids["gate"], grids["up"] = (Grid(format, *half) for half in halves)
            if "gate_up" in biases:
                biases["gate"], biases["up"] = biases["gate_up"].chunk(2)
        if run.shape.down_bias:
            biases["down"] = self._tensor(f"{base}down_bias")
        is_fused = ffn.gate is not None and ffn.gate.name == ffn.up.name
        if is_fused:  # the family's own module has both in one matrix
            of_gate, of_up = grids["gate"], grids["up"]
            grids["up"] = Grid(
                of_up.format,
                joined_halves(of_gate.integers, of_up.integers, ffn.up),
                joined_halves(of_gate.scales, of_up.scales, ffn.up),
            )
            if "up" in biases:
                biases["up"] = joined_halves(biases["gate"], biases["up"], ffn.up)
        places = {"up": ffn.up, "gate": None if is_fused else ffn.gate, "down": ffn.down}
        found = [(name, place) for name, place in places.items() if place is not None]
        return Piece(
            {self._stored(place.name): grids[name] for name, place in found},
            {self._stored(place.bias): biases[name] for name, place in found if place.bias is not None},
        )

    def _grid(self, name: str, format: Integer, rows: int, columns: int) -> Grid:
        """A matrix by the name of its bytes, in groups that divide its rows."""
        groups = 1 if format.group_size is None else -(-columns // format.group_size)
        stored = self._tensor(name)
        found = parted(
            stored, num_bits=format.num_bits, num_rows=rows, num_groups=groups, num_columns=columns
        )
        held, scales = _held(format, columns), found["weight_scale"]
        if held.group_size is not None:
            assert format.group_size is not None
            scales = scales.repeat_interleave(format.group_size // held.group_size, dim=1)
            scales = scales[:, : columns // held.group_size]
        return Grid(held, _unpacked(found["weight"], columns=columns), scales)

    def _tensor(self, name: str) -> Tensor:
        span = self._spans.get(name)
        if span is None:
            raise ConfigError(f"the artifact has no tensor {name}")
        with opened(span.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _stored_maps(run: FFNRun) -> dict[str, tuple[Integer, int, int]]:
    """The matrices that hold an FFN of one part: format, rows and columns, by name."""
    (part,) = run.layout.parts
    width, hidden = part.num_neurons, run.shape.hidden_size
    ups = {"gate_up": part.up} if part.is_fused else {"up": part.up, "gate": part.gate}
    formats = {**ups, "down": part.down}
    shapes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
    return {
        name: (format, *shapes.get(name, (width, hidden)))
        for name, format in formats.items()
        if isinstance(format, Integer)
    }


def _held(format: Integer, columns: int) -> Integer:
    """The format that holds the same scales for rows of `columns`, in groups of one size.

    Groups of 128 become groups of 64 if the last has 64 columns. Raises ConfigError if that would make groups
    too small.
    """
    size = format.group_size
    if size is None or size >= columns:
        return Integer(num_bits=format.num_bits)
    common = math.gcd(size, columns)
    if common < min(size, FEWEST_COLUMNS):
        raise _indivisible(f"an FFN in groups of {size}", columns)
    return Integer(num_bits=format.num_bits, group_size=common)


def _check_layouts(ffns: Sequence[FFNPlace], runs: Sequence[FFNRun], left_out: Sequence[FFNPlace]) -> None:
    """Raise ConfigError unless every FFN is one part of integers that the family's own modules can hold."""
    for ffn, run in zip(ffns, runs, strict=True):
        parts = [" and ".join(dict.fromkeys(map(_kind, part.formats))) for part in run.layout.parts]
        if len(parts) == 2:
            raise ConfigError(
                f"{ffn.name} has heavy hitters in {parts[0]} and other neurons in {parts[1]}, and "
                "compressed-tensors holds one format per matrix: compress with int8 or tiny"
            )
        if run.layout.down_bias != ffn.shape.down_bias:
            raise ConfigError(
                f"{ffn.name} has an output bias that only ffsplit can load: compress with fast --plain"
            )
    layouts = [
        LayerLayout.dense(ffn.shape, run.layout.num_neurons) for ffn, run in zip(ffns, runs, strict=True)
    ]
    groups = width_groups(ffns, left_out=left_out)
    if not is_stock_form(layouts, [ffn.shape for ffn in ffns], groups=groups):
        widths = sorted({run.layout.num_neurons for run in runs})
        if len(widths) == 1:
            raise ConfigError(
                f"no field of config.json states the FFNs' width, {widths[0]}: only ffsplit can load it"
            )
        raise ConfigError(
            f"the FFNs have different widths, {widths[0]} to {widths[-1]}, which only ffsplit can load: "
            "compress with fast --plain and export with --scheme, or with allocation: uniform in the recipe"
        )
    for ffn, run in zip(ffns, runs, strict=True):
        (part,) = run.layout.parts
        kinds = [_kind(each) for each in part.formats if not isinstance(each, Integer)]
        if kinds:
            raise ConfigError(
                f"{ffn.name} is stored {kinds[0]}, and compressed-tensors holds integers: compress with int8 "
                "or tiny, or with fast --plain and export with --scheme"
            )


def _kind(format: Format) -> str:
    if isinstance(format, Integer):
        groups = "" if format.group_size is None else f" in groups of {format.group_size}"
        return f"int{format.num_bits}{groups}"
    return "low rank" if isinstance(format, LowRank) else "in floating point"
