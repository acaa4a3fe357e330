"""About how many bytes of memory each stage takes. Rough, and rather too much than too little."""

from __future__ import annotations

from ffsplit.compressors.base import CHUNK_TOKENS
from ffsplit.preflight.workload import Workload

PROCESS_BYTES = 600_000_000
"""A worker with its libraries loaded and nothing to do."""
SINGLE, DOUBLE = 4, 8
LOGIT_COPIES = 6
"""Of both models' logits: as they come, as log-probabilities, and what is made of them."""


def process_bytes(work: Workload) -> int:
    """One that runs every stage keeps a third more: libraries of the others, and what the allocator holds."""
    return PROCESS_BYTES * 4 // 3 if work.is_one_process else PROCESS_BYTES


def calibration_bytes(work: Workload, *, block_by_block: bool) -> int:
    """One worker with the whole model, or one block and what lies outside the blocks."""
    held = work.outside_elements + work.block_elements if block_by_block else work.num_elements
    layers_sampled = 1 if block_by_block else work.num_blocks
    sampled = min(work.sampled_tokens, work.shard_tokens) * work.shape.hidden_size * layers_sampled
    return process_bytes(work) + (held + sampled) * work.itemsize + _batch_bytes(work)


def _batch_bytes(work: Workload) -> int:
    """What a batch takes on its way through a block that is watched."""
    hidden, neurons = work.shape.hidden_size, work.shape.num_neurons
    of_token = hidden * (10 * work.itemsize + 2 * SINGLE) + neurons * (3 * work.itemsize + 2 * SINGLE + 1)
    return work.batch_tokens * of_token


def compression_bytes(work: Workload) -> int:
    """One layer's FFN in float32, as it was, split and compressed, and the inputs it is fitted to."""
    shape, tokens = work.shape, work.sampled_tokens
    weights = int(shape.num_elements * SINGLE * (2 + 2 * work.kept))
    inputs = tokens * shape.hidden_size * SINGLE * _input_copies(work)
    chunk = min(tokens, CHUNK_TOKENS) * (4 * shape.num_neurons + 4 * shape.hidden_size) * SINGLE
    squares = max((_squares_bytes(step, work) for step in work.recipe.steps), default=0)
    return process_bytes(work) + weights + inputs + chunk + squares


def _input_copies(work: Workload) -> int:
    """What is held of the sampled tokens: inputs and outputs, and where layers are fitted, all once more."""
    is_fitted = any(step.kind == "distill" for step in work.recipe.steps)
    return 2 + 2 * is_fitted + 2 * bool(work.recipe.refits)


def _squares_bytes(step: object, work: Workload) -> int:
    """The square matrices, or the optimizer's state, that one step of a recipe works with."""
    kind, hidden = getattr(step, "kind", ""), work.shape.hidden_size
    neurons = work.shape.num_neurons
    if kind == "distill":
        return int(work.shape.num_elements * work.kept * SINGLE * 4)
    if kind == "prune" and getattr(step, "order", "") == "optimal_brain":
        return 3 * neurons * neurons * DOUBLE
    if kind == "prune":
        fits = getattr(step, "compensation", "") == "least_squares"
        return (2 * work.kept_neurons + 3 * hidden) * work.kept_neurons * DOUBLE if fits else 0
    widest = max(neurons, hidden)
    uses_moments = getattr(step, "whiten", False) or getattr(step, "method", "") == "gptq"
    return (3 * widest * widest if uses_moments else 3 * neurons * hidden) * DOUBLE


def measurement_bytes(work: Workload, *, block_by_block: bool) -> int:
    """Both models whole, or what lies outside the blocks of both and one block."""
    if block_by_block:
        held = 2 * work.outside_elements + work.block_elements
    else:
        held = int(work.num_elements * (1 + work.compressed_bytes / work.file_bytes))
    logits = work.batch_tokens * work.num_logits * SINGLE * LOGIT_COPIES
    return process_bytes(work) + held * work.itemsize + _batch_bytes(work) + logits


def peak_memory_bytes(work: Workload) -> int:
    """The process that waits, and the one that loads the model and runs it once."""
    rows = max(rows * length for rows, length in work.recipe.measurement.latency_shapes)
    model = work.num_elements * work.itemsize + rows * work.num_logits * SINGLE
    return process_bytes(work) + PROCESS_BYTES + model


def healing_bytes(work: Workload) -> int:
    """Teacher, student, gradients and the optimizer's two moments, in float32."""
    student = work.num_elements * work.compressed_bytes / work.file_bytes
    return process_bytes(work) + int((work.num_elements + 5 * student) * SINGLE) + 3 * _batch_bytes(work)
