"""Safetensors files written from parts of others, a few megabytes at a time: no tensor is ever held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from ffsplit.errors import ConfigError, explained

CHUNK_BYTES = 4 << 20
ALIGNMENT = 8
METADATA = "__metadata__"
DTYPE_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""The order in which the safetensors library writes tensors, so that these files are its to the byte."""


class TensorSpan(NamedTuple):
    """A tensor as bytes of a file, from `start` up to `stop`; `dtype` in the words of safetensors."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """Where every tensor of a file is. Raises ConfigError when the header is no header."""
    if not path.exists():
        raise ConfigError(f"{path} is missing")
    with explained(f"{path} is not a whole safetensors file"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
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
    ordered = sorted(spans, key=lambda name: (_rank(spans[name].dtype), name.encode()))
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    position = 0
    for name in ordered:
        span = spans[name]
        offsets = [position, position + span.size_bytes]
        header[name] = {"dtype": span.dtype, "shape": list(span.shape), "data_offsets": offsets}
        position += span.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            with spans[name].path.open("rb") as source:
                _copy(source, target, span=spans[name])


def _rank(dtype: str) -> tuple[int, str]:
    return (DTYPE_ORDER.index(dtype) if dtype in DTYPE_ORDER else len(DTYPE_ORDER)), dtype


def _copy(source: IO[bytes], target: IO[bytes], *, span: TensorSpan) -> None:
    source.seek(span.start)
    left = span.size_bytes
    while left:
        block = source.read(min(left, CHUNK_BYTES))
        if not block:
            raise ConfigError(f"{span.path} is not a whole safetensors file: it ends {left} bytes early")
        target.write(block)
        left -= len(block)
