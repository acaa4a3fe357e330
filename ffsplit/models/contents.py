"""Every byte of a checkpoint, read once: for its digest, and to refuse weights that are NaN or infinite."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path

import torch

from ffsplit.errors import ConfigError
from ffsplit.models.tensor_files import CHUNK_BYTES, TensorSpan, read_spans

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = ".safetensors"


def digest_files(directory: Path, names: Sequence[str]) -> str:
    """sha256 over the names, sizes and bytes of files of a directory: 64 hex digits.

    Raises ConfigError when a tensor among them is not finite, or a header is none.
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
    """The header and the tensors of a safetensors file, in which there is no gap between two tensors."""
    for name, span in sorted(spans.items(), key=lambda item: item[1].start):
        digest.update(file.read(span.start - file.tell()))
        for block in _blocks(file, buffer, size_bytes=span.size_bytes):
            if span.dtype in FLOATS:
                _check_finite(name, block, span)
            digest.update(block)


def _blocks(
    file: BufferedReader, buffer: memoryview, *, size_bytes: int = sys.maxsize
) -> Iterator[memoryview]:
    """The next bytes of a file, or all that follow, in blocks that each overwrite the one before."""
    while size_bytes and (num_read := file.readinto(buffer[:size_bytes])):
        size_bytes -= num_read
        yield buffer[:num_read]


def _check_finite(name: str, block: memoryview, span: TensorSpan) -> None:
    """Raise ConfigError when a part of a tensor has a NaN or an infinity. One pass, no copy."""
    bounds = torch.aminmax(torch.frombuffer(block, dtype=FLOATS[span.dtype]))
    if not (torch.isfinite(bounds.min) and torch.isfinite(bounds.max)):
        kind = "NaN" if bool(torch.isnan(bounds.min)) else "infinite numbers"
        raise ConfigError(
            f"{span.path.parent}: tensor {name} holds {kind}: get the checkpoint again, or mend that tensor"
        )
