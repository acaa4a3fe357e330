"""The trial of what was found by structure runs every FFN, whatever form a model's outputs have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from benchmarks.families.tiny import save, tiny_model
from ffsplit.calibration.hooks import FFNObserver, Sampling
from ffsplit.calibration.model_inputs import Batch
from ffsplit.errors import UnsupportedModelError
from ffsplit.measurement.fidelity import encoder_fidelity
from ffsplit.measurement.latency import example_inputs, vocab_size_of
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_base_model, load_whole_model
from ffsplit.models.selection import chosen
from ffsplit.runtime.trial import check_by_trial
from tests.tiny_models import VOCAB_SIZE, randomize

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
_TEXT = _SIZES | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "pad_token_id": 0}
_PEGASUS = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "num_global_tokens": 4, "block_size": 8}
_PEGASUS |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "vocab_size": VOCAB_SIZE}
_PEGASUS |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}

IDS = torch.randint(4, 50, (2, 8), generator=torch.Generator().manual_seed(0))
TEXTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def saved(directory: Path, class_name: str, **config: Any) -> Checkpoint:
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**config))
    randomize(model, seed=0)
    model.save_pretrained(directory)
    return open_checkpoint(directory)


def test_an_ffn_that_no_row_reaches_is_named_with_how_to_leave_it_out(tmp_path: Path) -> None:
    """CSM turns texts into codes of sounds, and has decoders of these codes."""
    save(tiny_model("csm", "CsmForConditionalGeneration"), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    unread = ("depth decoder model layer *",)
    with pytest.raises(
        UnsupportedModelError, match=r"does not run depth .* --skip 'depth decoder model layer \*'$"
    ):
        check_by_trial(checkpoint, TEXTS, block_by_block=False)
    rest = chosen(checkpoint, only=(), skip=unread)
    assert check_by_trial(rest, TEXTS, block_by_block=False) <= 1e-5


def test_an_ffn_that_other_code_computes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path, "GraniteForCausalLM", **_TEXT, num_key_value_heads=1)

    def fused(mlp: Any, x: Tensor) -> Tensor:
        gate, up = (functional.linear(x, each.weight) for each in (mlp.gate_proj, mlp.up_proj))
        return functional.linear(functional.silu(gate) * up, mlp.down_proj.weight)

    monkeypatch.setattr("transformers.models.granite.modeling_granite.GraniteMLP.forward", fused)
    with pytest.raises(UnsupportedModelError, match="computes layer 0 by other code than its modules'"):
        check_by_trial(checkpoint, TEXTS, block_by_block=False)


def test_outputs_may_be_nested(tmp_path: Path) -> None:
    """A backbone returns a tuple of maps of features, channels first."""
    config = _SIZES | {"image_size": [16, 16], "patch_size": [8, 8], "out_indices": [1, 2]}
    checkpoint = saved(tmp_path, "VitPoseBackbone", **config)
    assert 0 < check_by_trial(checkpoint, PICTURES, block_by_block=False) <= 1e-5
    model = load_whole_model(tmp_path, checkpoint.class_name)
    scores = encoder_fidelity(model, model, [Batch(PICTURES)])
    assert scores == {name: pytest.approx(1, abs=1e-6) for name in ("token_cosine", "pooled_cosine")}


def test_no_forward_pass_fills_a_cache(tmp_path: Path) -> None:
    """HRM runs its blocks in cycles, for which a cache of its layers has no place."""
    checkpoint = saved(tmp_path, "HrmTextForCausalLM", **_TEXT, H_cycles=1, L_cycles=2, L_bp_cycles=[1])
    assert check_by_trial(checkpoint, TEXTS, block_by_block=False) <= 1e-5
    model = load_base_model(checkpoint, device=IDS.device, dtype=torch.float32)
    assert model(**TEXTS).past_key_values is None


@torch.no_grad()
def test_an_ffn_may_run_several_times_in_a_block(tmp_path: Path) -> None:
    """PEGASUS-X pads the tokens to whole windows, and has global tokens beside them."""
    checkpoint = saved(tmp_path, "PegasusXForConditionalGeneration", **_PEGASUS)
    model = load_base_model(checkpoint, device=IDS.device, dtype=torch.float32)
    short = IDS[:, :5]
    arguments = {"input_ids": short, "attention_mask": torch.ones_like(short)}
    arguments |= {f"decoder_{name}": value for name, value in arguments.items()}
    sampling = Sampling(lambda count: torch.arange(count), {})
    with FFNObserver(model, checkpoint.ffns, sampling=sampling) as observer:
        for _ in range(3):
            observer.next_batch(arguments)
            model(**arguments)
    seen = {each.num_tokens for each in observer.statistics()[:2]}
    assert len(seen) == 1 and min(seen) >= 3 * 2 * 4, "the first call is masked, the others are not"


def test_the_vocabulary_may_be_the_encoders(tmp_path: Path) -> None:
    side = transformers.BertConfig(**_TEXT)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(side, side)
    model = transformers.EncoderDecoderModel(config).eval()
    assert vocab_size_of(model) == VOCAB_SIZE
    assert example_inputs(model, num_rows=4, num_tokens=16)["input_ids"].max() < VOCAB_SIZE
