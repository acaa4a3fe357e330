"""The search is judged end to end on rows of its own, and never returns worse than uniform there."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModel

import ffsplit
from ffsplit.artifacts.allocation import CandidateRecord
from ffsplit.artifacts.manifest import Manifest
from ffsplit.pipeline.prepare import prepare
from ffsplit.stages import allocate
from ffsplit.stages.allocate import best_of, score_of
from tests.small_jobs import SmallJob, digests


def searched(small_job: SmallJob, out: Path, **fields: Any) -> Manifest:
    recipe = small_job.recipe(allocation="search")
    return ffsplit.compress(small_job.config(out, recipe=recipe, **({"keep": 0.3} | fields)))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_never_worse_than_uniform_on_its_own_judge(
    family: str, small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    head = "" if family == "bert" else "ForCausalLM"
    manifest = searched(small_job, tmp_path / "out", model=str(checkpoint_of(family, head=head)))
    record = manifest.allocation
    assert record is not None and len(record.candidates) > 1
    uniform, *_ = record.candidates
    assert uniform.name == "uniform"
    (chosen,) = (each for each in record.candidates if each.name == record.chosen)
    assert chosen.score >= uniform.score
    for candidate in record.candidates:
        assert candidate.score == pytest.approx(fmean(candidate.fold_scores))
        assert candidate.score == pytest.approx(score_of(candidate.fidelity))
    assert chosen.num_elements == tuple(layer.num_elements for layer in manifest.layers)
    assert [stage.name for stage in manifest.stages] == ["calibrate", "allocate", "compress", "measure"]
    assert manifest.stages[2].num_reused == manifest.stages[2].num_items, "the winner is there already"


def scored(*fold_scores: float) -> CandidateRecord:
    return CandidateRecord(
        name="c", num_elements=(1,), score=fmean(fold_scores), fold_scores=fold_scores, fidelity={}
    )


@pytest.mark.parametrize(
    ("others", "best"),
    [
        ([], 0),
        ([(0.9, 0.9)], 1),
        ([(0.5, 0.5)], 0),
        ([(0.99, 0.5)], 0),
        ([(0.6, 0.6), (0.7, 0.7), (0.99, 0.1)], 2),
    ],
)
def test_what_wins_beats_uniform_on_every_fold(others: list[tuple[float, ...]], best: int) -> None:
    assert best_of([scored(0.5, 0.5), *(scored(*each) for each in others)]) == best


def test_every_candidate_meets_the_budget(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = searched(small_job, tmp_path / "out", keep=None, max_bytes=30_000)
    assert manifest.allocation is not None
    for candidate in manifest.allocation.candidates:
        assert 4 * sum(candidate.num_elements) <= 30_000


def test_uniform_stays_unless_one_beats_it(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "score_of", lambda fidelity: 0.5)
    manifest = searched(small_job, tmp_path / "out")
    plain = ffsplit.compress(small_job.config(tmp_path / "plain", keep=0.3))
    assert manifest.allocation is not None and manifest.allocation.chosen == "uniform"
    assert [layer.layout for layer in manifest.layers] == [layer.layout for layer in plain.layers]
    assert manifest.plain


def test_layers_of_different_widths_load_through_ffsplit(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "best_of", lambda records: 1)
    manifest = searched(small_job, tmp_path / "out")
    assert manifest.allocation is not None and manifest.allocation.chosen == "equal-error"
    assert len({layer.layout.num_neurons for layer in manifest.layers}) > 1
    assert manifest.plain is False
    model = ffsplit.load(str(tmp_path / "out"))
    ids = torch.arange(6, 30).view(2, 12)
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    with torch.no_grad():
        assert torch.equal(model(ids)[0], AutoModel.from_pretrained(attempt)(ids)[0])


def test_the_judge_has_rows_of_its_own(small_job: SmallJob, tmp_path: Path) -> None:
    run = prepare(small_job.config(tmp_path, recipe=small_job.recipe(allocation="search")))
    text = run.text
    groups = [set(text.calibration), set(text.held_out), set(text.judged)]
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups))
    plain = prepare(small_job.config(tmp_path)).text
    assert plain.held_out == text.held_out and plain.judged == ()
    assert plain.calibration[: len(text.calibration)] == text.calibration


def test_a_search_gives_the_same_bytes_again(small_job: SmallJob, tmp_path: Path) -> None:
    for name in ("one", "two"):
        searched(small_job, tmp_path / name)
    weights = ("*.safetensors", "config.json")
    assert digests(tmp_path / "one", *weights) == digests(tmp_path / "two", *weights)
