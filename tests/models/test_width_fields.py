"""Which field of a config states which widths, found by building the model again with another value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

import ffsplit
from ffsplit.models.checkpoint import open_checkpoint
from tests.models.test_structure import save
from tests.small_jobs import SmallJob
from tests.tiny_models import VOCAB_SIZE

DEEPSEEK: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("deepseek"), "DeepseekV2", **DEEPSEEK)


def test_a_field_may_state_a_width_in_units(source: Path) -> None:
    stated = {
        (ffn.shape.num_neurons, ffn.paths.width_field, ffn.paths.width_factor)
        for ffn in open_checkpoint(source).ffns
    }
    assert stated == {
        (40, "intermediate_size", 1),
        (16, "moe_intermediate_size", 1),
        (32, "moe_intermediate_size", 2),
    }


def test_both_kinds_are_narrowed_together_and_load_without_ffsplit(tmp_path: Path, source: Path) -> None:
    job = SmallJob(tmp_path, source)
    recipe = job.recipe(step="{kind: prune}", heavy_share=1.0)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, keep=0.6, samples=8))
    assert manifest.plain
    (made,) = (tmp_path / "out").glob("*/*/manifest.json")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(made.parent, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert model.config.moe_intermediate_size == 8 and model.config.n_shared_experts == 2
    assert model.model.layers[1].mlp.shared_experts.down_proj.in_features == 16


def test_a_checkpoint_that_contradicts_its_units_is_refused(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_intermediate_size": 8}))
    with pytest.raises(ffsplit.UnsupportedModelError, match="moe_intermediate_size 8"):
        open_checkpoint(tmp_path / "copy")
