"""The layer norm behind an FFN, in families that have one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffsplit.ffn.activations import activation_named
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.ffn_tensors import load_ffn, load_output_norm
from tests.conftest import CheckpointFactory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "block"), [("bert", "encoder.layer.1"), ("distilbert", "transformer.layer.1")]
)
def test_a_block_that_normalises_last_gives_the_norm_of_its_ffns_sum(
    checkpoint_of: CheckpointFactory, family: str, block: str
) -> None:
    """norm(x + FFN(x)) is what the block passes on, of what its FFN is given."""
    checkpoint = open_checkpoint(checkpoint_of(family))
    model = load_whole_model(checkpoint.directory, checkpoint.class_name)
    seen: dict[str, Any] = {}
    up = model.get_submodule(checkpoint.ffns[1].up.name.removesuffix(".weight"))
    up.register_forward_pre_hook(lambda _, inputs: seen.update(into=inputs[0]))
    model.get_submodule(block).register_forward_hook(lambda _, inputs, out: seen.update(out=out))
    with torch.no_grad():
        model(torch.arange(6, 30).view(2, 12))
    ffn = load_ffn(checkpoint, 1, activation=activation_named(checkpoint.activation_of(1)), device=CPU)
    norm = load_output_norm(checkpoint, 1, device=CPU)
    assert norm is not None
    x_TD = seen["into"].flatten(0, 1)
    passed_on = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    torch.testing.assert_close(norm(x_TD + ffn(x_TD)), passed_on.reshape(x_TD.shape), atol=1e-5, rtol=1e-4)


def test_a_block_that_normalises_first_has_none(checkpoint_of: CheckpointFactory) -> None:
    assert load_output_norm(open_checkpoint(checkpoint_of("llama")), 1, device=CPU) is None
