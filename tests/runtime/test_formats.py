"""Checkpoints of earlier formats, as earlier versions wrote them, load and save as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ffsplit  # noqa: F401  (registers the split format with transformers)
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.integer_map import IntegerMap

SAMPLES = Path(__file__).parent / "samples"


@torch.no_grad()
@pytest.mark.parametrize(
    "sample",
    ["format-1-low-rank", "format-1-int4", "format-2-int8", "format-3-integers", "format-4-widths"],
)
def test_an_earlier_format(sample: str, tmp_path: Path) -> None:
    """Each precision, fused gates, integers in attention and widths that differ; outputs lie beside."""
    directory = SAMPLES / sample
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["version"] == int(sample.split("-")[1])
    stored = load_file(directory / "outputs.safetensors")
    model = load_whole_model(directory, config["architectures"][0])
    found = model(input_ids=stored["input_ids"]).logits
    tolerance = 0.02 if any(isinstance(module, IntegerMap) for module in model.modules()) else 1e-5
    assert (found - stored["logits"]).norm() <= tolerance * stored["logits"].norm()
    model.save_pretrained(tmp_path)
    first, second = (load_file(each / "model.safetensors") for each in (directory, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
