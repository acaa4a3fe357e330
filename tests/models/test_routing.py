"""How mixtures are routed, as measured on models without weights: no name of a field or tensor is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from benchmarks.families.tiny import model_types, save, tiny_model
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.routing import routing_of
from tests.tiny_families import save_checkpoint
from tests.tiny_mixtures import MIXTURES, save_mixture
from tests.tiny_models import save_tokenizer

FIELDS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "olmoe": "num_experts",
    "gpt_oss": "num_local_experts",
    "ernie4_5_moe": "moe_num_experts",
    "deepseek_v3": "n_routed_experts",
    "deepseek_v3-grouped": "n_routed_experts",
}
ROUTERS = {
    "mixtral": {"block_sparse_moe.gate.weight"},
    "gpt_oss": {"mlp.router.weight", "mlp.router.bias"},
    "ernie4_5_moe": {"mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"},
    "deepseek_v3": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    "deepseek_v3-grouped": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_field_the_rows_and_the_fewest_experts_are_found(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(save_mixture(tmp_path, name))
    routing = routing_of(checkpoint)
    assert FIELDS[name] in routing.fields and routing.part is None
    found = {stored.split(".", 3)[3] for stored in routing.routers}
    assert found == ROUTERS.get(name, {"mlp.gate.weight"})
    mixture, number = routing.mixture, MIXTURES[name].num_experts
    assert mixture.num_experts == number
    grouped = name.endswith("grouped")
    assert (mixture.num_groups, mixture.fewest) == ((2, 4) if grouped else (1, 2))
    assert mixture.firsts == tuple(ffn.index for ffn in checkpoint.ffns if ffn.expert == 0)
    rows = sum(checkpoint.tensors[stored].num_elements for stored in routing.routers)
    assert mixture.router_elements * number == rows


def test_a_router_that_is_not_with_its_experts_is_refused(tmp_path: Path) -> None:
    sizes = MIXTURES["mixtral"].config | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    config = transformers.Gemma4TextConfig(**sizes, moe_intermediate_size=24, vocab_size_per_layer_input=8)
    transformers.Gemma4ForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UnsupportedModelError, match="gemma4_text cannot be dropped: its experts are not run"):
        routing_of(open_checkpoint(tmp_path))


def test_some_experts_alone_are_refused(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path, "mixtral", "ForCausalLM")
    checkpoint = open_checkpoint(directory, left_out=["layer 0 expert 1"])
    with pytest.raises(UnsupportedModelError, match="some experts are left out: give no --only or --skip"):
        routing_of(checkpoint)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", "its experts are not run by one module"),
        ("switch_transformers", "its experts are not run by one module"),
        ("dbrx", "its experts lie in tensors of an unusual form"),
    ],
)
def test_experts_of_another_layout_are_refused_for_what_they_are(
    tmp_path: Path, family: str, reason: str
) -> None:
    save(tiny_model(family, model_types()[family]), tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        routing_of(open_checkpoint(tmp_path))
