"""About how long each stage takes, by the floating-point operations in it and the bytes it reads."""

from __future__ import annotations

from ffsplit.preflight.workload import Workload

READ_BYTES_PER_S = 1e9
WRITE_BYTES_PER_S = 5e8
BACKWARD = 2
"""A backward pass over a forward one."""


def digest_seconds(work: Workload) -> float:
    """Every byte of the model is read once, for its digest."""
    return work.file_bytes / READ_BYTES_PER_S


def calibration_seconds(work: Workload, *, workers: int, speed: float, block_by_block: bool) -> float:
    computed = 2 * sum(work.elements_by_block) * work.calibration_tokens / speed
    loads = work.num_shards if block_by_block else workers
    return (computed + loads * work.file_bytes / READ_BYTES_PER_S) / min(workers, work.num_shards)


def compression_seconds(work: Workload, *, workers: int, speed: float) -> float:
    passes = 2 * work.shape.num_elements * work.sampled_tokens * (1 + work.kept) * 3
    layer = passes + sum(_step_operations(step, work) for step in work.recipe.steps)
    return layer * work.num_ffns / (speed * min(workers, work.num_ffns))


def search_seconds(work: Workload, *, workers: int, single: float, speed: float) -> float:
    """Layers are compressed once more than they are anyway; each block and both results are judged."""
    tokens = work.tokens_of(work.text.judged)
    judged = 2 * 2 * work.num_elements * tokens * (work.num_blocks + 2) / speed
    return compression_seconds(work, workers=workers, speed=single) + judged


def refit_seconds(work: Workload, *, workers: int, speed: float, block_by_block: bool) -> float:
    """Each is a pass of the text through the compressed model, and a fit of every layer."""
    passes = calibration_seconds(work, workers=workers, speed=speed, block_by_block=block_by_block)
    fits = work.num_ffns * sum(_step_operations(step, work) for step in work.recipe.refits)
    return passes * len(work.recipe.refits) + fits / (speed * min(workers, work.num_ffns))


def _step_operations(step: object, work: Workload) -> float:
    kind, shape = getattr(step, "kind", ""), work.shape
    neurons, hidden, kept = shape.num_neurons, shape.hidden_size, work.kept_neurons
    if kind == "distill":
        tokens = getattr(step, "num_steps", 0) * min(getattr(step, "batch_tokens", 0), work.sampled_tokens)
        return 2.0 * tokens * shape.num_elements * (1 + (1 + BACKWARD) * work.kept)
    if kind == "prune" and getattr(step, "order", "") == "optimal_brain":
        return 6.0 * neurons**3
    if kind == "prune":
        fits = getattr(step, "compensation", "") == "least_squares"
        return 2.0 * kept * (kept + hidden) * (2 * work.sampled_tokens + kept) if fits else 0.0
    return 20.0 * neurons * hidden * min(neurons, hidden)


def healing_seconds(work: Workload, *, speed: float) -> float:
    settings = work.recipe.healing
    assert settings is not None, "asked of recipes that heal"
    student = work.compressed_bytes / work.file_bytes
    passes = 1 + (1 + BACKWARD) * student
    tokens = max(work.calibration_tokens * settings.epochs, settings.min_steps * settings.batch_tokens)
    return 2 * work.num_elements * tokens * passes / speed


def measurement_seconds(work: Workload, *, speed: float, block_by_block: bool) -> float:
    both = 2 * work.num_elements * (1 + work.compressed_bytes / work.file_bytes)
    tokens = work.held_out_tokens
    if not block_by_block:
        settings = work.recipe.measurement
        tokens += sum(rows * length for rows, length in settings.latency_shapes) * settings.latency_pairs
    return both * tokens / speed + loading_seconds(work)


def loading_seconds(work: Workload) -> float:
    """Of both models."""
    return (work.file_bytes + work.compressed_bytes) / READ_BYTES_PER_S


def assembly_seconds(work: Workload) -> float:
    """The compressed checkpoint is written once."""
    return work.compressed_bytes / WRITE_BYTES_PER_S
