"""The allocation stage: candidates compressed like any run, and judged end to end on rows of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ffsplit.artifacts.manifest import AllocationRecord, CandidateRecord
from ffsplit.artifacts.scratch import Result
from ffsplit.calibration.batches import padded_batches, tokenize_rows
from ffsplit.config import Record
from ffsplit.distributed.runner import Runner
from ffsplit.ffn import ModelShape
from ffsplit.measurement.fidelity import fidelity
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_tokenizer, load_whole_model
from ffsplit.runtime.assemble import assemble
from ffsplit.splitting.allocation import Candidate
from ffsplit.stages.profile import ComputeProfile


class JudgeJob(Record):
    """Candidates' checkpoints, and the text to judge them on."""

    original_directory: str
    candidate_directories: tuple[str, ...]
    rows: tuple[str, ...]
    max_length: int
    batch_tokens: int
    profile: ComputeProfile


class Allocation(NamedTuple):
    """The candidate that won, and the scores of all."""

    chosen: Candidate
    record: AllocationRecord


def judge_job(job: JudgeJob) -> tuple[dict[str, float], ...]:
    """The fidelity of each candidate to the original; the original is loaded once."""
    with job.profile.applied():
        checkpoint = open_checkpoint(Path(job.original_directory))
        dtype, device = getattr(torch, job.profile.dtype), torch.device(job.profile.device)
        tokenizer = load_tokenizer(checkpoint)
        rows = tokenize_rows(tokenizer, job.rows, max_length=job.max_length)
        batches = padded_batches(rows, batch_tokens=job.batch_tokens, pad_id=tokenizer.pad_token_id or 0)
        on_device = [batch.to(device) for batch in batches]

        def load(directory: Path) -> torch.nn.Module:
            model: torch.nn.Module = load_whole_model(directory, checkpoint.class_name, dtype=dtype).to(
                device
            )
            return model

        original, kind = load(checkpoint.directory), checkpoint.architecture.kind
        return tuple(
            fidelity(original, load(Path(directory)), on_device, kind=kind)
            for directory in job.candidate_directories
        )


def score_of(fidelity: dict[str, float]) -> float:
    """One number to choose by, higher is better: minus the KL divergence, or the mean of both cosines."""
    if "kl_divergence" in fidelity:
        return -fidelity["kl_divergence"]
    return (fidelity["token_cosine"] + fidelity["pooled_cosine"]) / 2


def allocate(
    candidates: Sequence[Candidate],
    *,
    checkpoint: Checkpoint,
    model: ModelShape,
    compress: Callable[[Candidate], Sequence[Result]],
    layer_file: Callable[[Result], Path],
    job: JudgeJob,
    runner: Runner,
    folder: Path,
) -> Allocation:
    """Compress every candidate, judge them together, and take the best; the first unless one beats it.

    `job` lacks its candidates, which are put together in `folder` and removed again.
    """
    directories = []
    for candidate in candidates:
        files = [layer_file(result) for result in compress(candidate)]
        directories.append(folder / candidate.name)
        assemble(checkpoint, files, candidate.layouts, directories[-1])
    paths = tuple(str(path) for path in directories)
    judged = runner.run_alone("allocate", judge_job, job.model_copy(update={"candidate_directories": paths}))
    shutil.rmtree(folder)
    scores = [score_of(each) for each in judged]
    best = scores.index(max(scores))  # of equal scores the first, which is uniform
    records = tuple(
        CandidateRecord(
            name=candidate.name,
            num_elements=tuple(
                layout.num_elements(shape)
                for layout, shape in zip(candidate.layouts, model.shapes, strict=True)
            ),
            score=score,
            fidelity=each,
        )
        for candidate, score, each in zip(candidates, scores, judged, strict=True)
    )
    chosen = candidates[best]
    return Allocation(
        chosen, AllocationRecord(chosen=chosen.name, num_rows=len(job.rows), candidates=records)
    )
