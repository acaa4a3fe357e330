"""What the hooks see of experts: the router's weight times the norm of each output, token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffsplit.calibration.hooks import FFNObserver
from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import read_statistics, write_statistics
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.ffns import ffns_of
from ffsplit.models.load import load_whole_model
from tests.calibration.random_statistics import random_statistics
from tests.tiny_mixtures import save_mixture
from tests.tiny_models import random_rows

ROWS = random_rows(9)


@torch.no_grad()
def observed(model: Any, rows: list[list[int]], *, batch_tokens: int) -> tuple[NeuronStats, ...]:
    with FFNObserver(model, ffns_of(model)[1]) as observer:
        for batch in padded_batches(rows, batch_tokens=batch_tokens, pad_id=0):
            observer.next_batch(batch.arguments)
            model(**batch.arguments)
    return observer.statistics()


class Weighting(torch.nn.Module):
    """Runs a block's experts one at a time, and sums what each contributes to the tokens."""

    def __init__(self, experts: Any, number: int) -> None:
        super().__init__()
        self.experts, self.sums = experts, [0.0] * number

    def forward(self, states_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        for expert in range(len(self.sums)):
            alone_TK = torch.where(index_TK == expert, weights_TK, 0)
            contribution_TD = self.experts(states_TD, index_TK, alone_TK)
            self.sums[expert] += float(contribution_TD.norm(dim=1).double().sum())
        found: Tensor = self.experts(states_TD, index_TK, weights_TK)
        return found


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_the_weighted_norm_is_that_of_what_each_expert_contributes(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(save_mixture(tmp_path, name))
    model = load_whole_model(tmp_path, checkpoint.class_name).model
    statistics = observed(model, ROWS, batch_tokens=60)
    path = "layers.1.mlp.experts"
    weighting = Weighting(model.get_submodule(path), 4)
    model.set_submodule(path, weighting)
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    found = [
        stats.sum_weighted_norm
        for ffn, stats in zip(checkpoint.ffns, statistics, strict=True)
        if ffn.split_path == path
    ]
    assert found == pytest.approx(weighting.sums, rel=1e-4) and all(found)
    others = [stats for stats in statistics if stats.expert is None]
    assert all(stats.sum_weighted_norm is None for stats in others)


def test_weighted_norms_of_shards_add_up(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_mixture(tmp_path, "mixtral"))
    model = load_whole_model(tmp_path, checkpoint.class_name).model
    whole, first, second = (observed(model, rows, batch_tokens=60) for rows in (ROWS, ROWS[:4], ROWS[4:]))
    for one, *parts in zip(whole, first, second, strict=True):
        merged = parts[0].merge(parts[1])
        assert merged.sum_weighted_norm == pytest.approx(one.sum_weighted_norm, rel=1e-5)
        assert merged.num_tokens == one.num_tokens


def test_a_merge_with_statistics_that_lack_it_lacks_it_too() -> None:
    first, second = (replace(random_statistics(seed), expert=0) for seed in (0, 1))
    weighted = replace(first, sum_weighted_norm=2.0)
    assert weighted.merge(second).sum_weighted_norm is None
    assert weighted.merge(replace(second, sum_weighted_norm=0.5)).sum_weighted_norm == 2.5


def test_a_file_keeps_the_weighted_norms(tmp_path: Path) -> None:
    stats = random_statistics(0)
    layers = (stats, replace(stats, expert=0, sum_weighted_norm=1.5), replace(stats, expert=1))
    write_statistics(tmp_path / "stats.parquet", layers, lineage={})
    found = read_statistics(tmp_path / "stats.parquet")
    assert [each.sum_weighted_norm for each in found] == [None, 1.5, None]
    assert [each.expert for each in found] == [None, 0, 1]
