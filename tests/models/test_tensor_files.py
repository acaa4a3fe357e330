"""Files written span by span are those of the safetensors library, to the byte."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffsplit.errors import ConfigError
from ffsplit.models.tensor_files import CHUNK_BYTES, read_spans, write_spans, write_tensors

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
    *(torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{index}.{name}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for index, dtype in enumerate(DTYPES)
        for name, shape in (("wéight", (5, 3)), ("bias", (1,)), ("Z", (0, 4)), ("scalar", ()))
    }
    parts = [{n: t for n, t in tensors.items() if n.endswith("s") == last} for last in (False, True)]
    for index, part in enumerate(parts):
        save_file(part, tmp_path / f"part-{index}")
    save_file(tensors, tmp_path / "expected", {"format": "pt"})
    spans = read_spans(tmp_path / "part-0") | read_spans(tmp_path / "part-1")
    write_spans(tmp_path / "written", spans)
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
    assert load_file(tmp_path / "written").keys() == tensors.keys()


def test_memory_is_bounded_by_a_chunk(tmp_path: Path) -> None:
    save_file({"big": torch.ones(12 * CHUNK_BYTES, dtype=torch.uint8)}, tmp_path / "a", {"format": "pt"})
    tracemalloc.start()
    write_spans(tmp_path / "b", read_spans(tmp_path / "a"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * CHUNK_BYTES
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_source_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"x": torch.ones(100)}, path)
    spans = read_spans(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="ends 10 bytes early"):
        write_spans(tmp_path / "b", spans)


@pytest.mark.parametrize("data", [b"", b"\x08", b"\xff" * 16, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        read_spans(tmp_path / "a")
    with pytest.raises(ConfigError, match="is missing"):
        read_spans(tmp_path / "b")


def test_tensors_written_one_at_a_time_are_the_librarys(tmp_path: Path) -> None:
    """Also those that are not contiguous, have no element or no dimension."""
    values = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    tensors = {
        f"{index}.{name}": each.to(dtype, copy=True)
        for index, dtype in enumerate(dtypes)
        for name, each in (("a", values), ("rows", values[:3]), ("none", values[:0]), ("step", values[0, 0]))
    }
    metadata = {"state": '{"step": 3}'}
    save_file(tensors, tmp_path / "expected", metadata)
    write_tensors(tmp_path / "written", tensors | {"2.a": tensors["2.a"].T.contiguous().T}, metadata)
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
