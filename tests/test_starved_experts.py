"""Experts that saw too few tokens: reported, and their neurons kept by the norm of their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import ffsplit
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.config import Budget
from ffsplit.forecasts import plan
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.run.pipeline import tokens_of_experts
from ffsplit.runtime.ffn_tensors import load_ffn
from ffsplit.splitting.scores import FEWEST_TOKENS
from ffsplit.store.manifest import Manifest
from tests.small_jobs import SmallJob
from tests.tiny_families import FAMILIES, outputs
from tests.tiny_models import randomize, save_tokenizer

STARVED = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose router sends each token to experts 0 and 1 or to 2 and 3, never to expert 4.

    It scores them 2, 1, -2, -1 and 0 times one direction, and a token goes to the highest two.
    """
    config = FAMILIES["qwen3_moe"].config | {"num_experts": 5}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))
    randomize(model, seed=0)
    direction_D = torch.randn(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(
            torch.outer(torch.tensor([2.0, 1, -2, -1, 0]), direction_D)
        )
    directory = tmp_path_factory.mktemp("starved")
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(params=["share", "energy"])
def compressed(
    request: pytest.FixtureRequest, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Manifest, Path, str]:
    """The manifest, where it is, and what the run said."""
    job = SmallJob(tmp_path, source)
    energy = {"heavy_energy": 0.9} if request.param == "energy" else {}
    refits = "" if energy else "refits: [{num_steps: 3}]"
    recipe = job.recipe(step="{kind: prune}" if not energy else "{kind: low_rank}", more=refits, **energy)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe))
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    return manifest, attempt, capsys.readouterr().err


def test_a_starved_expert_is_reported(compressed: tuple[Manifest, Path, str]) -> None:
    manifest, attempt, said = compressed
    dense, *experts = manifest.layers
    assert [layer.name for layer in manifest.layers] == [
        "layer 0",
        *(f"layer 1 expert {number}" for number in range(5)),
    ]
    assert dense.num_tokens == manifest.calibration.num_tokens
    assert sum(each.num_tokens or 0 for each in experts) == 2 * manifest.calibration.num_tokens
    assert "refit" not in {stage.name for stage in manifest.stages}, "other tokens might be sent to an expert"
    starved = [each.by_weight_norm for each in experts]
    assert starved == [(each.num_tokens or 0) < FEWEST_TOKENS for each in experts]
    assert experts[STARVED].num_tokens == 0 and not all(starved)
    assert experts[STARVED].energy_in_top_5_percent is None
    assert "warning: 5 experts saw 0 to " in said
    assert "keep their neurons by weight norm: layer 1 expert 4 (0)" in said
    page = (attempt / "report.html").read_text()
    assert "layer 1 expert 4 (0)" in page and "0, too few" in page
    assert "All 6 FFNs as a table" in page and "each layer" not in page
    plans = plan(str(attempt), budgets=[Budget(kind="keep", limit=0.5)])
    assert [each.name for each in plans.concentration] == [layer.name for layer in manifest.layers]
    model = ffsplit.load(str(attempt))
    assert outputs(model).isfinite().all()


def test_a_starved_expert_keeps_the_neurons_of_the_largest_weights(source: Path, tmp_path: Path) -> None:
    job = SmallJob(tmp_path, source)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=job.recipe(step="{kind: prune}")))
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    before, after = (_down_of_starved(directory) for directory in (source, attempt))
    norms_N = before.norm(dim=0)
    largest = norms_N.topk(after.shape[1]).indices.sort().values
    assert 0 < len(largest) < len(norms_N)
    assert torch.equal(after, before[:, largest])


def test_a_starved_expert_has_no_say_in_a_search(source: Path, tmp_path: Path) -> None:
    """The experts of a layer share one layout in every candidate: it is their layer that is judged."""
    job = SmallJob(tmp_path, source)
    recipe = job.recipe(step="{kind: low_rank}", heavy_share=0.5, allocation="search")
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe))
    assert manifest.allocation is not None and manifest.layers[1 + STARVED].by_weight_norm
    names = [candidate.name for candidate in manifest.allocation.candidates]
    assert names[0] == "uniform" and len(names) > 1
    for candidate in manifest.allocation.candidates:
        dense, *experts = candidate.num_elements
        assert len(set(experts)) == 1 and dense > 0
    widths = {layer.layout.num_neurons for layer in manifest.layers[1:]}
    assert len(widths) == 1
    assert outputs(ffsplit.load(str(tmp_path / "out"))).isfinite().all()


def _down_of_starved(directory: Path) -> torch.Tensor:
    """[D, N]"""
    checkpoint = open_checkpoint(directory)
    weights = load_ffn(checkpoint, 1 + STARVED, activation=torch.relu, device=CPU)
    (part,) = weights.parts
    return part.down.weight


def statistics_of(expert: int | None, *, num_tokens: int) -> NeuronStats:
    zeros_N, counts_N = np.zeros(4), np.zeros(4, dtype=np.int64)
    return NeuronStats(num_tokens, zeros_N, zeros_N, zeros_N, zeros_N, counts_N, np.ones(4), expert)


def test_the_line_names_the_starved_fewest_tokens_first_and_not_too_many() -> None:
    enough = [statistics_of(number, num_tokens=FEWEST_TOKENS) for number in range(2)]
    names = [f"layer 0 expert {number}" for number in range(60)]
    assert tokens_of_experts(enough, names) == "2 experts saw 64 to 64 tokens each"
    few: list[NeuronStats] = [statistics_of(number, num_tokens=59 - number) for number in range(60)]
    line = tokens_of_experts([*few], names)
    assert line is not None
    assert (
        "60 saw fewer than 64" in line
        and "weight norm: layer 0 expert 59 (0), layer 0 expert 58 (1)," in line
    )
    assert "layer 0 expert 44 (15) and 44 more, in the manifest" in line and "expert 43" not in line


def test_experts_that_are_dropped_keep_no_neurons_and_are_not_named() -> None:
    few = [statistics_of(number, num_tokens=number) for number in range(3)]
    names = [f"layer 0 expert {number}" for number in range(3)]
    line = tokens_of_experts(few, names, dropped={0, 2})
    assert line is not None and "3 experts saw 0 to 2 tokens each; 1 saw fewer than" in line
    assert "expert 1 (1);" in line and "expert 0" not in line and "expert 2" not in line
    assert tokens_of_experts(few, names, dropped={0, 1, 2}) == "3 experts saw 0 to 2 tokens each"


def test_a_model_without_experts_has_no_such_line() -> None:
    assert tokens_of_experts([statistics_of(None, num_tokens=3)], ["layer 0"]) is None
