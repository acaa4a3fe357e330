"""The search is judged end to end on rows of its own, and never returns worse than uniform there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import ffsplit
from ffsplit.compute_profile import ComputeProfile
from ffsplit.errors import FFSplitError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.forecasts import inspect
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.run.job import prepare
from ffsplit.run.stages import search as allocate
from ffsplit.run.stages.search import (
    JudgeJob,
    divided,
    folds_of,
    judge_job,
    score_of,
    single_errors_job,
    wins,
)
from ffsplit.run.stages.widths import Tables
from ffsplit.runtime.assemble import assemble
from ffsplit.splitting.knapsack import WidthTable
from ffsplit.store.manifest import CandidateRecord, Manifest
from tests.run.stages.blank_rows import with_blank_rows
from tests.small_jobs import SmallJob, digests


def searched(small_job: SmallJob, out: Path, **fields: Any) -> Manifest:
    recipe = small_job.recipe(allocation="search")
    return ffsplit.compress(small_job.config(out, recipe=recipe, **({"keep": 0.3} | fields)))


@pytest.mark.parametrize(
    ("family", "head"), [("bert", ""), ("bert", "ForSequenceClassification"), ("llama", "ForCausalLM")]
)
def test_never_worse_than_uniform_on_its_own_judge(
    family: str, head: str, small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    manifest = searched(small_job, tmp_path / "out", model=str(checkpoint_of(family, head=head)))
    record = manifest.allocation
    assert record is not None
    uniform, *others = record.candidates
    by_tables = head == "ForCausalLM"
    proposed = "tables" if by_tables else "sensitivity"
    assert uniform.name == "uniform" and [each.name for each in others] in ([], [proposed])
    (chosen,) = (each for each in record.candidates if each.name == record.chosen)
    assert chosen.score >= uniform.score
    for candidate in record.candidates:
        assert candidate.score == pytest.approx(fmean(candidate.fold_scores))
        assert candidate.score == pytest.approx(score_of(candidate.fidelity))
    assert len(record.errors) == len(manifest.layers) and min(record.errors) > 0
    assert chosen.num_elements == tuple(layer.num_elements for layer in manifest.layers)
    tables = ["widths", "tables", "tables again"] if by_tables else []
    names = [stage.name for stage in manifest.stages]
    assert names == ["calibrate", *tables, "allocate", "compress", "measure"]
    (compress,) = (stage for stage in manifest.stages if stage.name == "compress")
    assert compress.num_reused == compress.num_items, "the winner is there already"


def test_the_error_of_one_layer_is_that_of_a_model_with_it_alone_compressed(
    small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    """Against a checkpoint put together for each layer, by way of the files."""
    source = checkpoint_of("bert", head="ForSequenceClassification")
    config = small_job.config(tmp_path / "plain", model=str(source), keep=0.3)
    narrow = run_directory(ffsplit.compress(config), tmp_path / "plain")
    text = tuple(small_job.text.read_text("utf-8").splitlines()[:20])
    job = JudgeJob(
        original=ModelSource(path=str(source)),
        candidates=(ModelSource(path=str(narrow)),),
        groups=(text,),
        max_length=16,
        batch_tokens=64,
        profile=ComputeProfile.resolve(config),
    )
    checkpoint = open_checkpoint(source)
    ours = {name: tensor for path in narrow.glob("*.safetensors") for name, tensor in load_file(path).items()}
    widths = [LayerLayout.dense(shape) for shape in checkpoint.shapes]
    expected = []
    for ffn in checkpoint.ffns:
        file = tmp_path / f"layer-{ffn.index}.safetensors"
        save_file({name: ours[name] for name in ffn.tensor_names}, file)
        others = [tmp_path / f"others-{ffn.index}.safetensors"]
        theirs = {n: t for path in source.glob("*.safetensors") for n, t in load_file(path).items()}
        names = [name for each in checkpoint.ffns if each is not ffn for name in each.tensor_names]
        save_file({name: theirs[name] for name in names}, others[0])
        width = len(ours[ffn.up.name])
        layouts = list(widths)
        layouts[ffn.index] = LayerLayout.dense(ffn.shape, width)
        target = tmp_path / f"alone-{ffn.index}"
        assemble(checkpoint, [file, *others], layouts, target)
        (folds,) = judge_job(job.of(ModelSource(path=str(target))))
        expected.append(folds)
    found = single_errors_job(job)
    for error, folds in zip(found, expected, strict=True):
        by_folds = [-score_of(fold) for fold in folds]
        assert min(by_folds) <= error <= max(by_folds) and error > 0


def run_directory(manifest: Manifest, out: Path) -> Path:
    return out / manifest.run_key / manifest.attempt


def scored(*fold_scores: float) -> CandidateRecord:
    return CandidateRecord(
        name="c", num_elements=(1,), score=fmean(fold_scores), fold_scores=fold_scores, fidelity={}
    )


@pytest.mark.parametrize(
    ("folds", "won"),
    [((-0.1, -0.1), True), ((-0.5, -0.5), False), ((-0.1, -0.49), False), ((-0.44, -0.44), True)],
)
def test_what_wins_is_clearly_closer_on_every_fold(folds: tuple[float, ...], won: bool) -> None:
    assert wins(scored(*folds), scored(-0.5, -0.5)) == won


def test_no_fold_mixes_groups_and_each_group_has_as_many() -> None:
    given, own = [f"g{number}" for number in range(9)], [f"o{number}" for number in range(4)]
    folds = folds_of([given, own], num_folds=4)
    assert [len(fold) for fold in folds] == [5, 4, 2, 2]
    assert all(len({row[0] for row in fold}) == 1 for fold in folds)
    assert sorted(row for fold in folds for row in fold) == sorted([*given, *own])
    assert len(folds_of([given], num_folds=4)) == 4
    assert folds_of([given[:2], [], own[:1]], num_folds=4) == [["g0"], ["g1"], ["o0"]]


def test_tables_take_as_many_rows_of_each_group_and_leave_others_to_judge_by() -> None:
    given, own = tuple(f"g{number}" for number in range(9)), tuple(f"o{number}" for number in range(4))
    rows, groups = divided((given, own), num_rows=6)
    assert rows == (*given[:3], *own[:2]) and groups == (given[3:], own[2:])
    assert divided((("a",),), num_rows=4) == (("a",), (("a",),)), "a single row serves for both"


def test_what_loses_on_one_group_of_rows_is_not_chosen(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_of: Any
) -> None:
    """Held-out rows count as another domain, on a fold of which the proposed widths are no better."""
    model = str(checkpoint_of("llama", head="ForCausalLM"))
    found = searched(small_job, tmp_path / "one", model=model).allocation
    assert found is not None and found.chosen == "tables"
    monkeypatch.setattr(allocate, "row_groups", lambda text: (text.validation, text.held_out))
    seen: list[tuple[str, ...]] = []

    def judged(job: JudgeJob) -> Any:
        seen.extend(job.groups)
        uniform, proposed = judge_job(job)
        return uniform, (*proposed[:-1], uniform[-1])

    monkeypatch.setattr(allocate, "judge_job", judged)
    kept = searched(small_job, tmp_path / "two", model=model).allocation
    assert kept is not None and kept.chosen == "uniform" and len(seen) == 2
    assert kept.candidates[1].score > kept.candidates[0].score, "it is better on average"


def test_every_candidate_meets_the_budget(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = searched(small_job, tmp_path / "out", keep=None, max_bytes=30_000)
    assert manifest.allocation is not None
    for candidate in manifest.allocation.candidates:
        assert 4 * sum(candidate.num_elements) <= 30_000


def test_uniform_stays_unless_it_is_beaten(
    small_job: SmallJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(allocate, "wins", lambda record, uniform: False)
    manifest = searched(small_job, tmp_path / "out")
    plain = ffsplit.compress(small_job.config(tmp_path / "plain", keep=0.3))
    assert manifest.allocation is not None and manifest.allocation.chosen == "uniform"
    assert "search: kept uniform widths" in capsys.readouterr().err
    assert [layer.layout for layer in manifest.layers] == [layer.layout for layer in plain.layers]
    assert manifest.plain


def test_layers_that_matter_alike_are_not_searched_further(
    small_job: SmallJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(allocate, "single_errors_job", lambda job: (0.02, 0.02, 0.02))
    record = searched(small_job, tmp_path / "out").allocation
    assert record is not None and record.chosen == "uniform"
    assert [each.name for each in record.candidates] == ["uniform"]
    assert "search: kept uniform widths; the errors of single layers" in capsys.readouterr().err


def test_a_search_needs_tokens_to_judge_by(small_job: SmallJob, tmp_path: Path) -> None:
    with_blank_rows(small_job, first=46, last=54)
    with pytest.raises(FFSplitError, match="the rows to compare candidates on are nothing but padding"):
        searched(small_job, tmp_path / "out")


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search does where the first layer matters four times as much as the last."""
    monkeypatch.setattr(allocate, "single_errors_job", lambda job: (0.04, 0.02, 0.01))
    alone = [WidthTable((8, 24, 64), (size, 0.3 * size, 0.0)) for size in (0.04, 0.02, 0.01)]
    monkeypatch.setattr(allocate, "measure_tables", lambda *_, **__: Tables(tuple(alone)))
    monkeypatch.setattr(allocate, "wins", lambda record, uniform: True)


@pytest.mark.subprocess
@pytest.mark.usefixtures("uneven")
@pytest.mark.slow
def test_layers_of_different_widths_load_through_ffsplit_alone(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = searched(small_job, tmp_path / "out")
    assert "search: chose per-layer widths (100, " in capsys.readouterr().err
    assert manifest.allocation is not None and manifest.allocation.chosen == "sensitivity"
    widths = [layer.layout.num_neurons for layer in manifest.layers]
    assert widths[0] > widths[1] > widths[2]
    assert manifest.plain is False
    model = ffsplit.load(str(tmp_path / "out"))
    ids = torch.arange(6, 30).view(2, 12)
    attempt = run_directory(manifest, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(ids)[0], AutoModel.from_pretrained(attempt)(ids)[0])
    script = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"
    alone = subprocess.run([sys.executable, "-c", script, attempt], capture_output=True, text=True)
    assert alone.returncode and "mismatch" in alone.stderr


DISTILL = "{kind: prune}, {kind: distill, num_steps: 3}"
HEALING = "healing: {epochs: 1, batch_rows: 8, evaluations: 1}"
INT8 = "after_healing: {kind: quantize, num_bits: 8}"


@pytest.mark.matrix()
@pytest.mark.usefixtures("uneven")
@pytest.mark.parametrize(
    ("more", "stages"),
    [
        ("refits: [{num_steps: 3}]", {"sample", "refit"}),
        (HEALING, {"heal"}),
        (INT8, {"quantize"}),
        (f"{HEALING}\n{INT8}", {"heal", "quantize"}),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_comes_after_keeps_the_widths(
    family: str, more: str, stages: set[str], small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    head = "ForSequenceClassification" if family == "bert" else "ForCausalLM"
    recipe = small_job.recipe(allocation="search", step=DISTILL, more=more)
    config = small_job.config(
        tmp_path / "out", model=str(checkpoint_of(family, head=head)), recipe=recipe, keep=0.3
    )
    manifest = ffsplit.compress(config)
    widths = [layer.layout.num_neurons for layer in manifest.layers]
    assert len(set(widths)) > 1 and not manifest.plain
    model = ffsplit.load(str(tmp_path / "out"))
    stored = [layer.num_elements for layer in manifest.layers]
    assert manifest.allocation is not None and stored == list(manifest.allocation.candidates[1].num_elements)
    assert torch.isfinite(model(torch.arange(6, 30).view(2, 12)).logits).all()
    assert stages < {stage.name for stage in manifest.stages}
    again = ffsplit.compress(config.model_copy(update={"out": str(tmp_path / "again")}))
    assert again.run_key == manifest.run_key
    weights = ("*.safetensors", "config.json")
    assert digests(tmp_path / "out", *weights) == digests(tmp_path / "again", *weights)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForCausalLM", ""])
@pytest.mark.parametrize(
    "fields", [{}, {"plain": True}, {"block_by_block": True}, {"memory_per_worker": 10**6}]
)
def test_auto_searches_for_classifiers_and_language_models_that_need_not_stay_plain(
    head: str, fields: dict[str, Any], small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    searches = bool(head) and not fields
    recipe = small_job.recipe(allocation="auto")
    model = str(checkpoint_of("llama" if head == "ForCausalLM" else "bert", head=head))
    run = prepare(small_job.config(tmp_path, model=model, recipe=recipe, **fields))
    assert run.recipe.allocation == ("search" if searches else "uniform")
    uniform = prepare(small_job.config(tmp_path, model=model, **fields))
    assert (run.keys.run == uniform.keys.run) == (not searches)
    assert bool(run.text.validation) == searches


def test_inspect_promises_no_plain_result_where_there_will_be_a_search(checkpoint_of: Any) -> None:
    plain = [
        {budget.plain for budget in inspect(str(checkpoint_of("bert", head=head)), recipe=recipe).budgets}
        for head in ("", "ForSequenceClassification")
        for recipe in ("fast", "norm-prune")
    ]
    assert plain == [{True}, {True}, {False}, {True}]


def test_the_judge_has_rows_of_its_own(small_job: SmallJob, tmp_path: Path) -> None:
    run = prepare(small_job.config(tmp_path, recipe=small_job.recipe(allocation="search")))
    text = run.text
    groups = [set(text.calibration), set(text.held_out), set(text.validation)]
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups))
    plain = prepare(small_job.config(tmp_path)).text
    assert plain.held_out == text.held_out and plain.validation == ()
    assert plain.calibration[: len(text.calibration)] == text.calibration


def test_a_search_gives_the_same_bytes_again(small_job: SmallJob, tmp_path: Path) -> None:
    for name in ("one", "two"):
        searched(small_job, tmp_path / name)
    weights = ("*.safetensors", "config.json")
    assert digests(tmp_path / "one", *weights) == digests(tmp_path / "two", *weights)
