"""llama.cpp's converter finds in a plain result what its GGUF writer expects of the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ffsplit
from ffsplit.cli import main
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob

gguf = pytest.importorskip("gguf")

HIDDEN, NUM_LAYERS = 64, 3
SUFFIXES = (".weight", ".bias")
K_QUANT = gguf.GGMLQuantizationType.Q4_K
FFN = {gguf.MODEL_TENSOR.FFN_GATE, gguf.MODEL_TENSOR.FFN_UP, gguf.MODEL_TENSOR.FFN_DOWN}


def plain_result(
    checkpoint_of: CheckpointFactory, folder: Path, family: str, *, intermediate_size: int, keep: float
) -> Path:
    options: dict[str, Any] = {"mlp_bias": False} if family == "llama" else {}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": intermediate_size}
    job = SmallJob(folder, checkpoint_of(family, head="ForCausalLM", **sizes, **options))
    manifest = ffsplit.compress(job.config(folder / "out", keep=keep, plain=True))
    assert manifest.plain
    assert main(["pull", str(folder / "out"), str(folder / "result")]) == 0
    return folder / "result"


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        ("llama", gguf.MODEL_ARCH.LLAMA),
        ("qwen2", gguf.MODEL_ARCH.QWEN2),
        ("qwen3", gguf.MODEL_ARCH.QWEN3),
    ],
)
def test_names_and_shapes_are_those_of_the_architecture(
    checkpoint_of: CheckpointFactory, tmp_path: Path, family: str, arch: Any
) -> None:
    """Written as the converter does: tensors by its name map, metadata from config.json."""
    result = plain_result(checkpoint_of, tmp_path, family, intermediate_size=128, keep=0.5)
    config = json.loads((result / "config.json").read_text())
    assert config["num_hidden_layers"] == NUM_LAYERS and config["intermediate_size"] < 128
    names = gguf.get_tensor_name_map(arch, NUM_LAYERS)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(NUM_LAYERS)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    kinds = []
    for name, tensor in load_file(result / "model.safetensors").items():
        kind, new = names.get_type_and_name(name, SUFFIXES)
        assert kind in gguf.MODEL_TENSORS[arch], name
        kinds.append(kind)
        writer.add_tensor(new, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert {kind: kinds.count(kind) for kind in FFN} == dict.fromkeys(FFN, NUM_LAYERS)
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    (width,) = read.fields[f"{gguf.MODEL_ARCH_NAMES[arch]}.feed_forward_length"].parts[-1].tolist()
    assert width == config["intermediate_size"]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in read.tensors}  # columns first, as in ggml
    for layer in range(NUM_LAYERS):
        assert (
            shapes[f"blk.{layer}.ffn_gate.weight"] == shapes[f"blk.{layer}.ffn_up.weight"] == [HIDDEN, width]
        )
        assert shapes[f"blk.{layer}.ffn_down.weight"] == [width, HIDDEN]


@pytest.mark.parametrize(("intermediate_size", "fits"), [(256, True), (192, False)])
def test_k_quants_take_widths_that_are_multiples_of_256(
    checkpoint_of: CheckpointFactory, tmp_path: Path, intermediate_size: int, fits: bool
) -> None:
    """Blocks of 256 lie along a row of the down projection, which has one column per neuron."""
    result = plain_result(checkpoint_of, tmp_path, "llama", intermediate_size=intermediate_size, keep=1)
    down = load_file(result / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == torch.Size([HIDDEN, intermediate_size])
    if fits:
        assert gguf.quant_shape_to_byte_shape(tuple(down.shape), K_QUANT) == (HIDDEN, 144)
    else:
        with pytest.raises(ValueError, match="multiple of Q4_K block size"):
            gguf.quant_shape_to_byte_shape(tuple(down.shape), K_QUANT)
