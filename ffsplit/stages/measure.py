"""The measurement stage: original and compressed side by side, in one process that does nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from ffsplit.artifacts.manifest import Measurements
from ffsplit.calibration.batches import padded_batches, tokenize_rows
from ffsplit.config import Record
from ffsplit.ffn import LayerLayout
from ffsplit.measurement.fidelity import fidelity
from ffsplit.measurement.latency import paired_latency
from ffsplit.measurement.memory import peak_memory_bytes
from ffsplit.measurement.size import compressed_size, original_size
from ffsplit.measurement.tasks.evaluations import Evaluation, score_evaluations
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_tokenizer, load_whole_model
from ffsplit.models.rows import ModelKind
from ffsplit.recipes.recipe import MeasurementSettings
from ffsplit.stages.profile import ComputeProfile


class MeasureJob(Record):
    """What to compare, and on which text."""

    original_directory: str
    compressed_directory: str
    layouts: tuple[LayerLayout, ...]
    held_out: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    max_length: int
    batch_tokens: int
    settings: MeasurementSettings
    profile: ComputeProfile


def measure_job(job: MeasureJob) -> Measurements:
    """Size, fidelity on held-out text, latency, task scores and peak memory of both models."""
    with job.profile.applied():
        return _measure(job)


def _measure(job: MeasureJob) -> Measurements:
    checkpoint = open_checkpoint(Path(job.original_directory))
    directories = (checkpoint.directory, Path(job.compressed_directory))
    dtype, device = getattr(torch, job.profile.dtype), torch.device(job.profile.device)
    original, compressed = (
        load_whole_model(directory, checkpoint.class_name, dtype=dtype).to(device)
        for directory in directories
    )
    tokenizer = load_tokenizer(checkpoint)
    rows = tokenize_rows(tokenizer, job.held_out, max_length=job.max_length)
    batches = padded_batches(rows, batch_tokens=job.batch_tokens, pad_id=tokenizer.pad_token_id or 0)
    on_device = (batch.to(device) for batch in batches)
    kind: ModelKind = "causal_lm" if checkpoint.class_name.endswith("ForCausalLM") else "encoder"
    scores = fidelity(original, compressed, on_device, kind=kind) if rows else {}
    vocab_size = int(original.config.vocab_size)
    latency = paired_latency(
        original,
        compressed,
        shapes=_shapes(job, checkpoint),
        num_pairs=job.settings.latency_pairs,
        vocab_size=vocab_size,
    )
    tasks = score_evaluations(job.evaluations, original, compressed, tokenizer)
    del original, compressed
    peaks = _peak_memory(job, checkpoint, directories, vocab_size=vocab_size)
    weights = directories[1].glob("*.safetensors")
    return Measurements(
        original_size=original_size(checkpoint),
        compressed_size=compressed_size(
            checkpoint, job.layouts, file_bytes=sum(path.stat().st_size for path in weights)
        ),
        fidelity=scores,
        latency=latency,
        tasks=tasks,
        original_peak_memory_bytes=peaks[0],
        compressed_peak_memory_bytes=peaks[1],
        device=job.profile.device,
        dtype=job.profile.dtype,
        num_threads=job.profile.threads,
    )


def _peak_memory(
    job: MeasureJob, checkpoint: Checkpoint, directories: tuple[Path, Path], *, vocab_size: int
) -> tuple[int | None, int | None]:
    """Peak bytes of the original and of the compressed model at the largest shape."""
    if not job.settings.peak_memory:
        return None, None
    original, compressed = (
        peak_memory_bytes(
            directory,
            checkpoint.class_name,
            shape=_shapes(job, checkpoint)[-1],
            device=job.profile.device,
            dtype=job.profile.dtype,
            vocab_size=vocab_size,
        )
        for directory in directories
    )
    return original, compressed


def _shapes(job: MeasureJob, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """The shapes to time, no row longer than the model can read."""
    longest = checkpoint.max_positions
    shapes = job.settings.latency_shapes
    return [(rows, tokens if longest is None else min(tokens, longest)) for rows, tokens in shapes]
