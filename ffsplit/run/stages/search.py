"""The search for widths: two candidates, compressed and compared end to end.

One has uniform widths. The other's come from the errors that single layers cause: at some widths of each for
language models (stages/widths.py), at the uniform one for all others.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from ffsplit.calibration.readers import make_reader
from ffsplit.calibration.sampling import TextSample
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compressors import AnyCompressor
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import LayerLayout, ModelShape
from ffsplit.keys import stage_key
from ffsplit.measurement.fidelity import fidelity
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_whole_model
from ffsplit.models.names import base_of
from ffsplit.run.checks import closed_form, measures_widths
from ffsplit.run.stages.fit import compress_layer_job, layer_jobs
from ffsplit.run.stages.widths import measure_tables
from ffsplit.runtime.assemble import assemble
from ffsplit.splitting.knapsack import TABLE_TOKENS
from ffsplit.splitting.proposal import UNIFORM, Candidate, propose, propose_widths
from ffsplit.splitting.scores import plan_split
from ffsplit.splitting.solver import Solver
from ffsplit.store.manifest import AllocationRecord, CandidateRecord
from ffsplit.store.scratch import Result

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution

Fidelity = dict[str, float]
Row = TypeVar("Row")
NUM_FOLDS = 4
"""Parts of the rows that candidates are compared on. The winner must beat the uniform layers on each.

No part mixes groups of rows, which differ in where they are from.
"""
LEAST_GAIN = 0.1
"""The fraction by which a candidate must reduce the uniform layers' distance from the original.

A smaller gain would not justify giving up one common width, which makes an ordinary checkpoint.
"""
MOST_ROWS = 256
"""Upper limit on the rows for comparing single blocks."""


class JudgeJob(Record):
    """Compressed checkpoints, the original, and the text on which they are compared."""

    original: ModelSource
    candidates: tuple[ModelSource, ...]
    groups: tuple[tuple[str, ...], ...]
    max_length: int
    batch_tokens: int
    profile: ComputeProfile

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of all groups."""
        return tuple(chain.from_iterable(self.groups))

    def of(self, *candidates: ModelSource) -> JudgeJob:
        """This job, with these candidates."""
        return self.model_copy(update={"candidates": candidates})


class Allocation(NamedTuple):
    """The candidate that was chosen, and what led to it. Its layers may be in `part` of the scratch."""

    chosen: Candidate
    record: AllocationRecord
    part: str


class _Bench:
    """The original model and its batches, by fold. Made once per job."""

    def __init__(self, job: JudgeJob, *, groups: Sequence[Sequence[str]], num_folds: int) -> None:
        self._checkpoint = job.original.checkpoint()
        self._dtype, self._device = getattr(torch, job.profile.dtype), torch.device(job.profile.device)
        reader = make_reader(self._checkpoint, max_length=job.max_length, batch_tokens=job.batch_tokens)
        self._folds = [
            [batch.to(self._device, dtype=self._dtype) for batch in reader.batches(fold)]
            for fold in folds_of([reader.encode(rows) for rows in groups], num_folds=num_folds)
        ]
        self.original = self.load(self._checkpoint.directory)
        self.blocks = [ffn.block for ffn in self._checkpoint.ffns]

    def load(self, directory: Path) -> Any:
        return load_whole_model(directory, self._checkpoint.class_name, dtype=self._dtype).to(self._device)

    def judge(self, model: Any) -> tuple[Fidelity, ...]:
        """The fidelity of a model to the original on each fold."""
        makes = self._checkpoint.compared_as
        return tuple(fidelity(self.original, model, batches, makes=makes) for batches in self._folds)


def folds_of(groups: Sequence[Sequence[Row]], *, num_folds: int) -> list[Sequence[Row]]:
    """Folds of about equal numbers of rows, each of one group: as many of each, and at least one."""
    groups = [group for group in groups if group]
    each = max(1, num_folds // max(1, len(groups)))
    return [
        group[start :: min(each, len(group))] for group in groups for start in range(min(each, len(group)))
    ]


def judge_job(job: JudgeJob) -> tuple[tuple[Fidelity, ...], ...]:
    """The fidelity of each candidate to the original on each fold. The original is loaded once."""
    with job.profile.applied():
        bench = _Bench(job, groups=job.groups, num_folds=NUM_FOLDS)
        return tuple(bench.judge(bench.load(source.directory())) for source in job.candidates)


def single_errors_job(job: JudgeJob) -> tuple[float, ...]:
    """The error of each FFN's block: minus the score of the original with only this block compressed."""
    with job.profile.applied():
        bench = _Bench(job, groups=[job.rows[:MOST_ROWS]], num_folds=1)
        (source,) = job.candidates
        mixed, blocks = bench.load(source.directory()), list(dict.fromkeys(bench.blocks))
        compressed = [_exchanged(mixed, block, _block(bench.original, block)) for block in blocks]
        errors = {}
        for block, module in zip(blocks, compressed, strict=True):
            own = _exchanged(mixed, block, module)
            errors[block] = max(0.0, -sum(score_of(found) for found in bench.judge(mixed)))
            _exchanged(mixed, block, own)
        return tuple(errors[block] for block in bench.blocks)


def _block(model: Any, path: str) -> nn.Module:
    base: nn.Module = base_of(model)
    return base.get_submodule(path)


def _exchanged(model: Any, path: str, other: nn.Module) -> nn.Module:
    """Replace a block of a model. Returns the block that was there before."""
    own = _block(model, path)
    base_of(model).set_submodule(path, other)
    return own


def score_of(fidelity: Fidelity) -> float:
    """One number to choose by: minus the distance from the original. At most 0; higher is better."""
    if "kl_divergence" in fidelity:
        return -fidelity["kl_divergence"]
    if "logit_error" in fidelity:
        return -fidelity["logit_error"]
    return fmean(fidelity.values()) - 1.0


def record_of(candidate: Candidate, folds: Sequence[Fidelity], *, model: ModelShape) -> CandidateRecord:
    """The manifest's record of a candidate."""
    pairs = zip(candidate.layouts, model.shapes, strict=True)
    scores = tuple(score_of(fold) for fold in folds)
    return CandidateRecord(
        name=candidate.name,
        num_elements=tuple(layout.num_elements(shape) for layout, shape in pairs),
        score=fmean(scores),
        fold_scores=scores,
        fidelity={name: fmean(fold[name] for fold in folds) for name in folds[0]},
    )


def wins(record: CandidateRecord, uniform: CandidateRecord) -> bool:
    """Whether a candidate's distance from the original is smaller by LEAST_GAIN or more on every fold."""
    pairs = zip(record.fold_scores, uniform.fold_scores, strict=True)
    return all(ours > (1 - LEAST_GAIN) * theirs for ours, theirs in pairs)


def in_one_line(record: AllocationRecord) -> str:
    """What a search found, as one line of the log."""
    uniform, *others = record.candidates
    if not others:
        return "search: kept uniform widths; the errors of single layers suggest no others"
    found = others[0]
    ours, theirs = f"{-found.score:.3g}", f"{-uniform.score:.3g}"
    if record.chosen == uniform.name:
        return f"search: kept uniform widths (error {theirs}); per-layer widths gave {ours}"
    largest = max(found.num_elements)
    shares = ", ".join(f"{100 * each / largest:.0f}" for each in found.num_elements)
    return (
        f"search: chose per-layer widths ({shares} % of the largest; error {ours}); "
        f"uniform widths gave {theirs}; they need ffsplit to load, and --plain keeps one width"
    )


def row_groups(text: TextSample) -> tuple[tuple[str, ...], ...]:
    """The rows to choose by, in groups by where they are from. A candidate has to win on each group."""
    return tuple(rows for rows in (text.validation, text.own_validation) if rows)


def divided(
    groups: Sequence[tuple[str, ...]], *, num_rows: int
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """About `num_rows` rows to measure tables on, as many of each group, and the groups of the others.

    At most half of a group is taken. A single row serves for both.
    """
    wanted = -(-num_rows // max(1, len(groups)))
    taken = [min(wanted, max(1, len(group) // 2)) for group in groups]
    pairs = list(zip(groups, taken, strict=True))
    rest = tuple(group[count:] or group for group, count in pairs)
    return tuple(chain.from_iterable(group[:count] for group, count in pairs)), rest


def search(
    execution: Execution,
    solver: Solver,
    layouts: tuple[LayerLayout, ...],
    statistics: tuple[NeuronStats, ...],
    shards: Sequence[Result],
    *,
    folder: Path,
) -> Allocation:
    """Look for a better split of the budget over the layers than the uniform one.

    Two candidates are compressed and assembled in `folder`, which is removed afterwards: the uniform layers,
    and the widths that errors of single layers suggest. The latter are chosen if they win. Widths from
    tables are compared by the closed form alone; others after all of the recipe's steps.
    """
    run, runner, uniform = execution.run, execution.runner, Candidate(UNIFORM, layouts)
    settings, groups, tables = run.recipe.calibration, row_groups(execution.text), None
    steps: tuple[AnyCompressor, ...] = run.recipe.steps
    if measures_widths(run.checkpoint, layouts, steps):
        steps, num_rows = closed_form(steps), TABLE_TOKENS[run.profile.device] // settings.row_length
        rows, groups = divided(groups, num_rows=num_rows)
        tables = measure_tables(execution, solver, layouts, statistics, shards, rows=rows)
    job = JudgeJob(
        original=execution.model,
        candidates=(),
        groups=groups,
        max_length=settings.row_length,
        batch_tokens=settings.compared_tokens,
        profile=run.profile,
    )

    def built(candidate: Candidate) -> ModelSource:
        directory = folder / candidate.name
        plans = plan_split(statistics, candidate.layouts, score=run.recipe.score)
        jobs = layer_jobs(execution, run.checkpoint, steps, plans, shards, part=part_of(candidate))
        answers = dict(runner.map_tasks("allocate", compress_layer_job, jobs))
        files = [execution.scratch.path(answers[index].files[0]) for index in range(len(jobs))]
        assemble(run.checkpoint, files, candidate.layouts, directory)
        return execution.hand_over(directory)

    with execution.log.stage("allocate", stage_key("allocate", {"run": run.keys.run}), num_items=1):
        sources, candidates = [built(uniform)], [uniform]
        if tables is None:
            errors = runner.run_alone("allocate", single_errors_job, job.of(*sources))
            proposed = propose(solver, run.budget, errors, uniform=layouts)
        else:
            errors = tables.errors_near(layouts)
            curves = tables.curves(solver.model, multiple=solver.multiple)
            proposed = propose_widths(solver, run.budget, curves, uniform=layouts)
        if proposed is not None:
            sources.append(built(proposed))
            candidates.append(proposed)
        scores = runner.run_alone("allocate", judge_job, job.of(*sources))
        shutil.rmtree(folder)
        chosen, record = _chosen(candidates, scores, errors, model=run.solver.model, num_rows=len(job.rows))
    execution.log.note(in_one_line(record))
    return Allocation(chosen, record, part_of(chosen) if steps == run.recipe.steps else "compress")


def _chosen(
    candidates: Sequence[Candidate],
    scores: Sequence[Sequence[Fidelity]],
    errors: tuple[float, ...],
    *,
    model: ModelShape,
    num_rows: int,
) -> tuple[Candidate, AllocationRecord]:
    """The last candidate if it beats the first, which is uniform; otherwise the first."""
    if not all(scores):
        raise ConfigError("the rows to compare candidates on are nothing but padding: give other text")
    records = tuple(
        record_of(candidate, folds, model=model) for candidate, folds in zip(candidates, scores, strict=True)
    )
    chosen = candidates[-1] if len(candidates) > 1 and wins(records[-1], records[0]) else candidates[0]
    record = AllocationRecord(chosen=chosen.name, num_rows=num_rows, errors=errors, candidates=records)
    return chosen, record


def part_of(candidate: Candidate) -> str:
    """Where the layers of a candidate are, below the scratch."""
    return f"allocate/{candidate.name}"
