"""What is special to experts in unusual layouts, shared FFNs and adapters; `test_survey` compresses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import ffsplit
from benchmarks.families.config import tiny_config
from benchmarks.families.tiny import model_types, save, tiny_model
from ffsplit.calibration.hooks import FFNObserver
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_base_model
from tests.small_jobs import SmallJob
from tests.tiny_models import VOCAB_SIZE, randomize


def saved(model_type: str, directory: Path) -> Path:
    save(tiny_model(model_type, model_types()[model_type]), directory)
    return directory


def test_layers_may_have_other_functions_at_one_place(tmp_path: Path) -> None:
    """Step 3.7 clamps the experts of its last layers only."""
    checkpoint = open_checkpoint(saved("step3p7/clamped", tmp_path / "model"))
    functions = {ffn.block: ffn.paths.function for ffn in checkpoint.ffns if ffn.expert == 0}
    assert len(set(functions.values())) == 2, functions
    assert all(ffn.block in ffn.paths.blocks for ffn in checkpoint.ffns if ffn.expert is not None)
    assert len({ffn.name for ffn in checkpoint.ffns}) == len(checkpoint.ffns)


def test_a_refit_that_would_ignore_adapters_is_refused(tmp_path: Path) -> None:
    source = saved("zamba2", tmp_path / "model")
    config = SmallJob(tmp_path, source).config(tmp_path / "out", recipe="fast", samples=8)
    with pytest.raises(ffsplit.ConfigError, match=r"adapters add to its up projection .* use norm-prune"):
        ffsplit.compress(config)


@torch.no_grad()
def test_an_ffn_that_several_blocks_run_is_one_and_sees_what_all_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("zamba", tmp_path / "model"))
    (ffn,) = checkpoint.ffns
    assert (ffn.block, ffn.twins) == ("layers.1", ("layers.3",))
    assert not checkpoint.can_stream and not ffn.paths.can_split
    base = load_base_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with FFNObserver(base, checkpoint.ffns) as observer:
        observer.next_batch(arguments)
        base(**arguments)
    (statistics,) = observer.statistics()
    assert statistics.num_tokens == 2 * ids.numel()


def test_an_ffn_that_two_towers_share_is_refused(tmp_path: Path) -> None:
    source = saved("diffusion_gemma", tmp_path / "model")
    with pytest.raises(ffsplit.UnsupportedModelError, match="an FFN that several towers share"):
        open_checkpoint(source)


def test_experts_that_are_only_narrowed_run_as_a_stack(tmp_path: Path) -> None:
    """One layer of two, so that no config can state the width."""
    job = SmallJob(tmp_path, saved("olmoe", tmp_path / "model"))
    recipe = job.recipe(step="{kind: prune}", heavy_share=1.0)
    manifest = ffsplit.compress(
        job.config(tmp_path / "out", recipe=recipe, keep=0.5, samples=8, skip=("layer 1*",))
    )
    assert not manifest.plain
    model = ffsplit.load(str(tmp_path / "out"))
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert type(first) is type(second) and type(first).__name__ == "OlmoeExperts"
    assert first.down_proj.shape[2] < second.down_proj.shape[2] and first.down_proj.isfinite().all()
    assert first.gate_up_proj.shape[1] == 2 * first.down_proj.shape[2]


@torch.no_grad()
def test_rows_that_are_sorted_by_expert_are_not_taken_for_positions(tmp_path: Path) -> None:
    """JetMoE's, with one expert for each token: as many rows as positions, in another order."""
    config = tiny_config("jetmoe")
    config.num_experts_per_tok = 1
    model = transformers.JetMoeForCausalLM(config)
    randomize(model, seed=0)
    save(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    base = load_base_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(VOCAB_SIZE, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 4:] = 0
    seen = []
    base.layers[0].mlp.input_linear.register_forward_pre_hook(lambda _, given: seen.append(list(given[1])))
    with FFNObserver(base, checkpoint.ffns) as observer:
        arguments = {"input_ids": ids, "attention_mask": mask}
        observer.next_batch(arguments)
        base(**arguments)
    counts = [stats.num_tokens for stats in observer.statistics()[: config.num_local_experts]]
    assert counts == [int(count) for count in seen[0]]
