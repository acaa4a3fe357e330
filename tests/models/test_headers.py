"""Which files are a checkpoint's weights: those that transformers would read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.models.tensor_files import INDEX_NAME, WEIGHTS_NAME, read_headers, weights_file

FILES = (WEIGHTS_NAME, INDEX_NAME, "model.fp16.safetensors", "other.safetensors", "pytorch_model.bin")
SHARD = "model-00001-of-00001.safetensors"
OTHER_INDEX = "sub/other.safetensors.index.json"
NAMED = (
    *(None, "other.safetensors", SHARD, OTHER_INDEX, "absent.safetensors", "pytorch_model.bin", ""),
    *("../other.safetensors", "sub/../other.safetensors", "other.safetensors.json"),
)


def made(directory: Path, files: tuple[str, ...]) -> Path:
    """A directory with some files, each of which holds a tensor of its own name."""
    (directory / "sub").mkdir(parents=True)
    for name in (*files, SHARD, OTHER_INDEX):
        if name.endswith(".json"):
            index = {"metadata": {}, "weight_map": {SHARD: SHARD}}
            (directory / name).write_text(json.dumps(index))
        else:
            save_file({name: torch.zeros(1)}, directory / name, {"format": "pt"})
    return directory


def of_transformers(directory: Path, named: object) -> list[str] | None:
    """The files that from_pretrained reads, None where it reads none."""
    options: dict[str, Any] = {"variant": None, "gguf_file": None, "user_agent": None}
    try:
        files, _ = _get_resolved_checkpoint_files(
            str(directory),
            use_safetensors=True,
            is_remote_code=False,
            transformers_explicit_filename=named,
            **options,
        )
    except (OSError, ValueError):
        return None
    assert files is not None
    found = [Path(file).resolve() for file in files]
    return [str(file.relative_to(directory)) for file in found] if all(f.is_file() for f in found) else None


def of_ffsplit(directory: Path, named: object) -> list[str] | None:
    try:
        found = sorted({info.file for info in read_headers(directory, named=named).values()})
    except ConfigError as error:
        assert "\n" not in str(error) and str(directory) in str(error)
        return None
    return [str((directory / file).resolve().relative_to(directory)) for file in found]


@pytest.mark.parametrize("named", NAMED)
def test_the_files_are_those_that_transformers_chooses(tmp_path: Path, named: str | None) -> None:
    subsets = [subset for size in range(6) for subset in itertools.combinations(FILES, size)]
    assert len(subsets) == 32
    for number, files in enumerate(subsets):
        directory = made(tmp_path / str(number), files)
        assert of_ffsplit(directory, named) == of_transformers(directory, named), files


def test_a_shard_counts_whole_and_the_last_of_two_tensors_counts(tmp_path: Path) -> None:
    """As in transformers, an index says which files there are, not which of their tensors count."""
    for number in (1, 2):
        tensors = {"both": torch.zeros(number), f"own.{number}": torch.zeros(number)}
        save_file(tensors, tmp_path / f"{number}.safetensors", {"format": "pt"})
    weight_map = {"both": "1.safetensors", "own.2": "2.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tensors = read_headers(tmp_path)
    assert tensors.keys() == {"both", "own.1", "own.2"}
    assert tensors["both"].file == "2.safetensors" and tensors["both"].shape == (2,)


def test_other_names_are_not_guessed_at(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(ConfigError, match=r"transformers does not read model\.fp16\.safetensors"):
        weights_file(tmp_path)


def test_a_part_of_every_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    """Transformers prefers such files to all others, and needs a process for each."""
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    save_file({"a": torch.zeros(1)}, tmp_path / "shard-00000-model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match="distributed checkpoint"):
        read_headers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_numbers_are_refused_by_the_tensor_s_name(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"layers.0.weight": torch.zeros(2, 2).to(dtype)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.weight is F8_E.*float32, float16 or bfloat16"
    ):
        read_headers(tmp_path)


def test_every_size_is_the_files(tmp_path: Path) -> None:
    dtypes = [
        torch.float64,
        torch.float16,
        torch.int16,
        torch.uint8,
        torch.bool,
        torch.uint32,
        torch.complex64,
    ]
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    found = read_headers(tmp_path)
    assert {name: info.size_bytes for name, info in found.items()} == {
        n: t.nbytes for n, t in tensors.items()
    }
