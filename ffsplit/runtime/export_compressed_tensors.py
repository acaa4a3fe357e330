"""`ffsplit export --format compressed-tensors`: integer weights as vLLM and transformers read them.

Matrices are written by the library of that name. All other tensors are copied byte for byte.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit.errors import ConfigError
from ffsplit.ffn.quantization import SCALE_DTYPE, spread_scales
from ffsplit.ffn.shapes import Integer
from ffsplit.models.folder import CONFIG_NAME
from ffsplit.models.load_options import check_trusted
from ffsplit.models.tensor_files import read_json, read_spans
from ffsplit.runtime.assemble import MAX_SHARD_BYTES, write_shards
from ffsplit.runtime.plugin import METHOD
from ffsplit.runtime.stock_matrices import (
    Grid,
    StockMatrices,
    empty_stock_model,
    rounded_matrices,
    stored_matrices,
)

Scheme = Literal["W8A8", "W8A16", "W4A16"]
"""Bits of weights and of inputs, as llm-compressor names them."""
INSTALL = "pip install 'ffsplit[compressed-tensors]'"


def export_compressed_tensors(directory: Path, target: Path, *, scheme: Scheme | None) -> None:
    """Write a checkpoint's weights and config into `target`, which has its other files already.

    `scheme` None: as the integers are stored. Raises ConfigError if the extra is missing, the format cannot
    hold the model, a scheme is missing, or it would round integers again.
    """
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format compressed-tensors needs {error.name}: {INSTALL}") from None
    check_trusted(directory)
    model = _matrices(directory, scheme)
    scheme = scheme or _usual_scheme(model.ffn_formats)
    (target / CONFIG_NAME).write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n", "utf-8")
    linears = {
        name.removeprefix(model.prefix): module
        for name, module in empty_stock_model(target, model.config).named_modules()
        if isinstance(module, nn.Linear)
    }
    with tempfile.TemporaryDirectory(dir=target, prefix=".pieces-") as pieces:
        formats = _write_weights(model, target, Path(pieces), linears=linears, scheme=scheme)
    _write_config(target, formats, ignored=[path for path in linears if path not in formats], scheme=scheme)


def _matrices(directory: Path, scheme: Scheme | None) -> StockMatrices:
    """The matrices of an artifact or a model. Raises ConfigError if they do not fit the scheme."""
    config = read_json(directory / CONFIG_NAME, f"{directory} is not a model: it has no config.json")
    stored = config.get("quantization_config")
    if not stored:
        if scheme is None:
            raise ConfigError(
                f"{directory} is in floating point: give --scheme W8A8, W8A16 or W4A16 to round its FFNs to "
                "the nearest integers, or compress with int8 or tiny"
            )
        return rounded_matrices(directory, num_bits=int(scheme[1]), grouped=scheme != "W8A8")
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        raise ConfigError(f"{directory} is quantized already, and not by ffsplit: export its original")
    found = stored_matrices(directory, config)
    if scheme is not None and not all(_fits(each, scheme) for each in found.ffn_formats):
        raise ConfigError(
            f"--scheme {scheme} would round integers again, which are stored for "
            f"{_usual_scheme(found.ffn_formats)}: omit --scheme, or export a plain result"
        )
    return found


def _fits(format: Integer, scheme: Scheme) -> bool:
    return format.num_bits == int(scheme[1]) and (scheme != "W8A8" or format.group_size is None)


def _usual_scheme(formats: Iterable[Integer]) -> Scheme:
    """The scheme of stored integers: inputs are rounded too where the artifact's own kernels do so."""
    schemes: tuple[Scheme, ...] = ("W8A8", "W8A16")
    return next((each for each in schemes if all(_fits(format, each) for format in formats)), "W4A16")


def _write_weights(
    model: StockMatrices, target: Path, folder: Path, *, linears: dict[str, nn.Linear], scheme: Scheme
) -> dict[str, Integer]:
    """Write all tensors; returns the format of each matrix by its path. Pieces lie in `folder` meanwhile."""
    formats, spans = {}, dict(model.spans)
    for number, piece in enumerate(model.pieces):
        tensors = dict(piece.others)
        for name, grid in piece.grids.items():
            path = model.paths[name]
            if path not in linears or linears[path].weight.shape != grid.integers.shape:
                raise ConfigError(
                    f"{path} is not a linear layer of {list(grid.integers.shape)} in this family"
                )
            formats[path] = grid.format
            for part, tensor in _compressed(grid, scheme).items():
                tensors[f"{name.removesuffix('weight')}{part}"] = tensor.contiguous()
        file = folder / f"{number:06d}.safetensors"
        save_file(tensors, file, {"format": "pt"})
        spans |= read_spans(file)
    write_shards(spans, target, max_shard_bytes=MAX_SHARD_BYTES)
    return formats


def _compressed(grid: Grid, scheme: Scheme) -> dict[str, Tensor]:
    """A matrix as the library stores it, by the names of a linear layer's tensors.

    The library rounds a float matrix to given scales. In float32 an integer of 8 bits times a bfloat16 scale,
    divided by that scale, is exact, so it finds the same integers.
    """
    from compressed_tensors.compressors import BaseCompressor

    chosen = _scheme_of(grid.format, scheme, targets=())
    spread = spread_scales(grid.scales, num_columns=grid.integers.shape[1], group_size=grid.format.group_size)
    given = {"weight": grid.integers.float() * spread, "weight_scale": grid.scales.float()}
    compressor = BaseCompressor.get_value_from_registry(chosen.format)
    found: dict[str, Tensor] = compressor.compress(given, chosen)
    return found | {"weight_scale": grid.scales.to(SCALE_DTYPE)}


def _scheme_of(format: Integer, scheme: Scheme, *, targets: Iterable[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rounds_inputs = scheme == "W8A8"
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if rounds_inputs else None
    weights = QuantizationArgs(
        num_bits=format.num_bits,
        strategy="channel" if format.group_size is None else "group",
        group_size=format.group_size,
    )
    return QuantizationScheme(
        targets=list(targets),
        weights=weights,
        input_activations=inputs,
        format="int-quantized" if rounds_inputs else "pack-quantized",
    )


def _write_config(target: Path, formats: dict[str, Integer], *, ignored: list[str], scheme: Scheme) -> None:
    """Add the library's entry to config.json: modules by format, and those without one."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    paths: dict[Integer, list[str]] = {}
    for path, format in formats.items():
        paths.setdefault(format, []).append(path)
    every = {*formats, *ignored}
    groups = {
        f"group_{index}": _scheme_of(
            format, scheme, targets=["Linear"] if len(paths) == 1 else _patterns(of_format, every)
        )
        for index, (format, of_format) in enumerate(paths.items())
    }
    settings = QuantizationConfig(
        config_groups=groups,
        format=groups["group_0"].format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_patterns(ignored, every),
    )
    ModelCompressor(quantization_config=settings).update_config(str(target))


def _patterns(paths: Iterable[str], every: Iterable[str]) -> list[str]:
    """Regular expressions that match these modules and no others of `every`, as short as numbers allow.

    A class with a head has its base model below a prefix, and the same modules without one.
    """
    wanted = set(paths)
    others = {_widened(path) for path in every if path not in wanted}
    found = (_widened(path) if _widened(path) not in others else re.escape(path) for path in paths)
    return [f"re:(?:.*\\.)?{pattern}$" for pattern in dict.fromkeys(found)]


def _widened(path: str) -> str:
    """A pattern of this path with any numbers."""
    return re.sub(r"\d+", r"\\d+", re.escape(path))
