"""Safetensors files: their headers, their bytes read once, and new files written from parts of others."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import safe_open

from ffsplit.errors import ConfigError, UnsupportedModelError, explained

ITEM_SIZES = {
    "C64": 8,
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of a checkpoint that several processes saved, each its part of every tensor."""
SCALED = re.compile(r"F[48]|[IU]4")
"""Dtypes whose values need scales, which are separate tensors."""


class TensorInfo(NamedTuple):
    """Where a tensor is and what it looks like; `dtype` as safetensors names it."""

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
        return self.num_elements * ITEM_SIZES[self.dtype]


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError, with the text `missing` if there is no such file."""
    if not path.is_file():
        raise ConfigError(missing)
    with explained(f"{path} is not JSON"):
        value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def read_headers(directory: Path, *, named: object = None) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint, by name. Raises ConfigError when a file or a tensor is missing.

    `named` is the file that config.json names as `transformers_weights`, if any.
    """
    weights = weights_file(directory, named=named)
    weight_map: dict[str, str] = {}
    if weights.name.endswith(".json"):
        weight_map = _weight_map(weights)
    files = sorted(set(weight_map.values())) or [str(weights.relative_to(directory))]
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        with opened(directory / name) as file:
            for tensor in file.keys():  # noqa: SIM118
                view = file.get_slice(tensor)
                tensors[tensor] = TensorInfo(name, view.get_dtype(), tuple(view.get_shape()))
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise ConfigError(f"{weights} names {absent[0]}, which {weight_map[absent[0]]} does not hold")
    for name, info in tensors.items():
        if info.dtype not in ITEM_SIZES:
            raise UnsupportedModelError(
                f"{directory}: {name} is {info.dtype}, which needs scales to be read: start from the "
                "original in float32, float16 or bfloat16"
                if SCALED.match(info.dtype)
                else f"{directory}: {name} is {info.dtype}; weights may be {', '.join(ITEM_SIZES)}"
            )
    return tensors


def weights_file(directory: Path, *, named: object = None) -> Path:
    """The file or index that transformers reads, chosen as `from_pretrained` does (a test compares them).

    The file that the config names comes first, then a single file, then an index. Variants, which have a
    word before their suffix, are read only on request. Raises ConfigError when there is none.
    """
    shards = [path.name for path in sorted(directory.iterdir()) if DISTRIBUTED.fullmatch(path.name)]
    if shards:
        raise ConfigError(
            f"{directory} holds {shards[0]}, one process's part of a distributed checkpoint: load it with "
            "from_pretrained and save it with save_pretrained"
        )
    if named is not None:
        chosen = directory / str(named)
        inside = Path(os.path.abspath(chosen)).is_relative_to(os.path.abspath(directory))
        if not inside or not str(named).endswith((".safetensors", ".safetensors.index.json")):
            raise ConfigError(
                f"{directory}/config.json: transformers_weights {str(named)!r} must name a .safetensors file "
                "or a .safetensors.index.json in the model's directory"
            )
        if not chosen.is_file():
            raise ConfigError(f"{chosen} is missing: config.json names it as transformers_weights")
        return chosen
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if (directory / name).is_file():
            return directory / name
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise ConfigError(
            f"{directory} has no {WEIGHTS_NAME} and no {INDEX_NAME}: transformers does not read {others[0]}; "
            "rename it, or name it in config.json as transformers_weights"
        )
    raise ConfigError(f"{directory} has no {WEIGHTS_NAME} and no {INDEX_NAME}")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, according to an index. Raises ConfigError when the index is invalid."""
    stated = read_json(index, "")
    weight_map = stated.get("weight_map")
    if not (
        weight_map and isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ConfigError(f"{index} has no weight_map")
    if not isinstance(stated.get("metadata"), dict):  # transformers does not load it without this field
        raise ConfigError(f'{index} has no metadata: add "metadata": {{}} to it')
    return weight_map


@contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors file, memory-mapped. Raises ConfigError when it is missing or truncated."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    with ExitStack() as stack:
        with explained(f"{path} is not a whole safetensors file"):
            file = stack.enter_context(safe_open(path, framework=framework))
        yield file


# Read every byte of a checkpoint once: for its digest, and to reject NaN or infinite weights.

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = ".safetensors"


def digest_files(directory: Path, names: Sequence[str]) -> str:
    """sha256 over the names, sizes and bytes of files of a directory: 64 hex digits.

    Raises ConfigError when a tensor holds NaN or Inf, or a header is invalid.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    for name in names:
        path = directory / name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            if name.endswith(WEIGHTS):
                _digest_weights(file, read_spans(path), digest, buffer)
            for block in _blocks(file, buffer):
                digest.update(block)
    return digest.hexdigest()


def _digest_weights(
    file: BufferedReader, spans: Mapping[str, TensorSpan], digest: hashlib._Hash, buffer: memoryview
) -> None:
    """Digest a safetensors file's header and tensors, between which the format allows no gaps."""
    for name, span in sorted(spans.items(), key=lambda item: item[1].start):
        digest.update(file.read(span.start - file.tell()))
        for block in _blocks(file, buffer, size_bytes=span.size_bytes):
            if span.dtype in FLOATS:
                _check_finite(name, block, span)
            digest.update(block)


def _blocks(
    file: BufferedReader, buffer: memoryview, *, size_bytes: int = sys.maxsize
) -> Iterator[memoryview]:
    """The next bytes of a file, or all that are left, in blocks that each overwrite the previous one."""
    while size_bytes and (num_read := file.readinto(buffer[:size_bytes])):
        size_bytes -= num_read
        yield buffer[:num_read]


def _check_finite(name: str, block: memoryview, span: TensorSpan) -> None:
    """Raise ConfigError when a part of a tensor has a NaN or an infinity. One pass, no copy.

    A single number may be infinite: Gemma stores the limits at which it clips, which may be none.
    """
    bounds = torch.aminmax(torch.frombuffer(block, dtype=FLOATS[span.dtype]))
    if math.prod(span.shape) == 1 and bool(torch.isinf(bounds.min)):
        return
    if not (torch.isfinite(bounds.min) and torch.isfinite(bounds.max)):
        kind = "NaN" if bool(torch.isnan(bounds.min)) else "infinite numbers"
        raise ConfigError(
            f"{span.path.parent}: tensor {name} holds {kind}: get the checkpoint again, or fix that tensor"
        )


# Write safetensors files from parts of others, a few megabytes at a time: no whole tensor is in memory.

CHUNK_BYTES = 4 << 20
ALIGNMENT = 8
METADATA = "__metadata__"
DTYPE_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""The order in which the safetensors library writes tensors, so that files have the same bytes as its own."""


class TensorSpan(NamedTuple):
    """A tensor as bytes of a file, from `start` up to `stop`; `dtype` as safetensors names it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    others: tuple[TensorSpan, ...] = ()
    """Where the bytes go on: the tensor is a stack or some rows, and this is its first part."""

    @classmethod
    def stacked(cls, parts: Sequence[TensorSpan], *, flat: bool = False) -> TensorSpan:
        """Tensors of one shape as one, along a new first dimension, or, `flat`, along their first."""
        first, *others = parts
        assert all((each.dtype, each.shape) == (first.dtype, first.shape) for each in others)
        rows, *rest = first.shape
        shape = (len(parts) * rows, *rest) if flat else (len(parts), *first.shape)
        return first._replace(shape=shape, others=tuple(others))

    def rows(self, kept: Sequence[int]) -> TensorSpan:
        """Some of a tensor's rows: parts along its first dimension of more than 1."""
        assert kept and not self.others
        dim = next((index for index, size in enumerate(self.shape) if size > 1), 0)
        step = (self.stop - self.start) // self.shape[dim]
        starts = [self.start + row * step for row in kept]
        first, *others = (self._replace(start=start, stop=start + step) for start in starts)
        shape = (*self.shape[:dim], len(kept), *self.shape[dim + 1 :])
        return first._replace(shape=shape, others=tuple(others))

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start + sum(each.size_bytes for each in self.others)


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """Where every tensor of a file is. Raises ConfigError when the header is invalid."""
    if not path.exists():
        raise ConfigError(f"{path} is missing")
    with explained(f"{path} is not a whole safetensors file"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header would be longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        base = 8 + length
        return {
            name: TensorSpan(
                path, info["dtype"], tuple(info["shape"]), *(base + end for end in info["data_offsets"])
            )
            for name, info in header.items()
            if name != METADATA
        }


def write_spans(path: Path, spans: Mapping[str, TensorSpan]) -> None:
    """Write tensors of other files to a new one, with the header that the library would write."""
    entries = {name: (span.dtype, span.shape, span.size_bytes) for name, span in spans.items()}
    ordered, header = _header(entries, {"format": "pt"})
    with path.open("wb") as target:
        target.write(header)
        for name in ordered:
            for span in (spans[name], *spans[name].others):
                with span.path.open("rb") as source:
                    _copy(source, target, span=span)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the bytes of safetensors' `save_file`, with a copy of one tensor at a time in memory."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    entries = {name: (names[each.dtype], tuple(each.shape), each.nbytes) for name, each in tensors.items()}
    ordered, header = _header(entries, metadata)
    with path.open("wb") as target:
        target.write(header)
        for name in ordered:
            values = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            target.write(values.view(torch.uint8).numpy().data)


def _header(
    entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[list[str], bytes]:
    """The order of a file's tensors, given their dtypes, shapes and bytes, and all that comes before them."""
    ordered = sorted(entries, key=lambda name: (_rank(entries[name][0]), name.encode()))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    position = 0
    for name in ordered:
        dtype, shape, num_bytes = entries[name]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + num_bytes],
        }
        position += num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return ordered, len(text).to_bytes(8, "little") + text


def _rank(dtype: str) -> tuple[int, str]:
    return (DTYPE_ORDER.index(dtype) if dtype in DTYPE_ORDER else len(DTYPE_ORDER)), dtype


def _copy(source: IO[bytes], target: IO[bytes], *, span: TensorSpan) -> None:
    source.seek(span.start)
    left = span.stop - span.start
    while left:
        block = source.read(min(left, CHUNK_BYTES))
        if not block:
            raise ConfigError(f"{span.path} is not a whole safetensors file: it ends {left} bytes early")
        target.write(block)
        left -= len(block)
