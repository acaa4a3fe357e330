"""The allocation stage: candidates compressed like any run, and judged end to end on rows of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from ffsplit.artifacts.allocation import AllocationRecord, CandidateRecord
from ffsplit.artifacts.scratch import Result
from ffsplit.calibration.readers import make_reader
from ffsplit.config import Record
from ffsplit.distributed.runner import Runner
from ffsplit.errors import ConfigError
from ffsplit.ffn import ModelShape
from ffsplit.measurement.fidelity import fidelity
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.models.source import ModelSource
from ffsplit.runtime.assemble import assemble
from ffsplit.splitting.allocation import Candidate
from ffsplit.stages.profile import ComputeProfile

Fidelity = dict[str, float]
NUM_FOLDS = 4
"""Parts of the judge's rows. What beats the uniform layers has to on each of them."""


class JudgeJob(Record):
    """Candidates' checkpoints, and the text to judge them on."""

    original: ModelSource
    candidates: tuple[ModelSource, ...]
    rows: tuple[str, ...]
    max_length: int
    batch_tokens: int
    profile: ComputeProfile


class Allocation(NamedTuple):
    """The candidate that won, and the scores of all."""

    chosen: Candidate
    record: AllocationRecord


def judge_job(job: JudgeJob) -> tuple[tuple[Fidelity, ...], ...]:
    """The fidelity of each candidate to the original, a fold at a time; the original is loaded once."""
    with job.profile.applied():
        checkpoint = open_checkpoint(job.original.directory())
        dtype, device = getattr(torch, job.profile.dtype), torch.device(job.profile.device)
        reader = make_reader(checkpoint, max_length=job.max_length, batch_tokens=job.batch_tokens)
        rows = reader.encode(job.rows)
        num_folds = min(NUM_FOLDS, len(rows))
        folds = [
            [batch.to(device, dtype=dtype) for batch in reader.batches(rows[start::num_folds])]
            for start in range(num_folds)
        ]

        def load(directory: Path) -> Any:
            return load_whole_model(directory, checkpoint.class_name, dtype=dtype).to(device)

        original, kind = load(checkpoint.directory), checkpoint.compared_as
        judged = []
        for source in job.candidates:
            candidate = load(source.directory())
            judged.append(tuple(fidelity(original, candidate, batches, kind=kind) for batches in folds))
        return tuple(judged)


def score_of(fidelity: Fidelity) -> float:
    """One number to choose by, higher is better: minus the KL divergence, or the mean of the cosines."""
    if "kl_divergence" in fidelity:
        return -fidelity["kl_divergence"]
    return fmean(fidelity.values())


def record_of(candidate: Candidate, folds: Sequence[Fidelity], *, model: ModelShape) -> CandidateRecord:
    """What the manifest says of a candidate."""
    pairs = zip(candidate.layouts, model.shapes, strict=True)
    scores = tuple(score_of(fold) for fold in folds)
    return CandidateRecord(
        name=candidate.name,
        num_elements=tuple(layout.num_elements(shape) for layout, shape in pairs),
        score=fmean(scores),
        fold_scores=scores,
        fidelity={name: fmean(fold[name] for fold in folds) for name in folds[0]},
    )


def best_of(records: Sequence[CandidateRecord]) -> int:
    """The best of those that beat the first on every fold, and the first where none does.

    Folds keep chance out: a search that wins by a hair would cost an ordinary checkpoint for nothing.
    """
    first = records[0].fold_scores
    winners = [
        index
        for index, record in enumerate(records)
        if all(ours > theirs for ours, theirs in zip(record.fold_scores, first, strict=True))
    ]
    return max(winners, key=lambda index: records[index].score, default=0)


def allocate(
    candidates: Sequence[Candidate],
    *,
    checkpoint: Checkpoint,
    model: ModelShape,
    compress: Callable[[Candidate], Sequence[Result]],
    layer_file: Callable[[Result], Path],
    hand_over: Callable[[Path], ModelSource],
    job: JudgeJob,
    runner: Runner,
    folder: Path,
) -> Allocation:
    """Compress every candidate, judge them together, and take the first unless one beats it.

    `job` lacks its candidates, which are put together in `folder` and removed again.
    """
    directories = []
    for candidate in candidates:
        files = [layer_file(result) for result in compress(candidate)]
        directories.append(folder / candidate.name)
        assemble(checkpoint, files, candidate.layouts, directories[-1])
    sources = tuple(hand_over(path) for path in directories)
    judged = runner.run_alone("allocate", judge_job, job.model_copy(update={"candidates": sources}))
    shutil.rmtree(folder)
    if not all(judged):
        raise ConfigError("the rows to judge candidates on are nothing but padding: give other text")
    records = tuple(
        record_of(candidate, folds, model=model) for candidate, folds in zip(candidates, judged, strict=True)
    )
    chosen = candidates[best_of(records)]
    return Allocation(
        chosen, AllocationRecord(chosen=chosen.name, num_rows=len(job.rows), candidates=records)
    )
