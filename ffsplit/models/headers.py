"""Safetensors files as their headers tell them: which tensors there are, without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from ffsplit.errors import ConfigError, explained

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


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object. Raises ConfigError, with the text `missing` where there is no such file."""
    if not path.is_file():
        raise ConfigError(missing)
    with explained(f"{path} is not JSON that can be read"):
        value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint, by name. Raises ConfigError when a file or a tensor is missing."""
    index = directory / INDEX_NAME
    if index.is_file():
        stated = read_json(index, "")
        weight_map: dict[str, str] = stated.get("weight_map") or {}
        if not (
            weight_map
            and isinstance(weight_map, dict)
            and all(isinstance(v, str) for v in weight_map.values())
        ):
            raise ConfigError(f"{index} has no weight_map")
        if not isinstance(stated.get("metadata"), dict):  # without which transformers does not load it
            raise ConfigError(f'{index} has no metadata: add "metadata": {{}} to it')
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
    with ExitStack() as stack:
        with explained(f"{path} is not a whole safetensors file"):
            file = stack.enter_context(safe_open(path, framework=framework))
        yield file
