"""The memory that each stage takes, roughly: estimates on the high side."""

from __future__ import annotations

from ffsplit.compressors.base import CHUNK_TOKENS, FLOAT32_BYTES
from ffsplit.run.workload import Workload
from ffsplit.splitting.knapsack import KL_ROWS, TABLE_TOKENS

PROCESS_BYTES = 600_000_000
"""An idle worker with its libraries loaded."""
LOGIT_COPIES = 6
"""Copies of both models' logits: raw, as log-probabilities, and intermediate results."""


def process_bytes(work: Workload) -> int:
    """A process that runs every stage needs a third more: more libraries, and memory the allocator keeps."""
    return PROCESS_BYTES * 4 // 3 if work.is_one_process else PROCESS_BYTES


def calibration_bytes(work: Workload, *, block_by_block: bool) -> int:
    """One worker with the whole model, or one block and what lies outside the blocks."""
    held = work.outside_elements + work.block_elements if block_by_block else work.num_elements
    layers_sampled = 1 if block_by_block else work.num_blocks
    sampled = min(work.sampled_tokens, work.shard_tokens) * work.shape.hidden_size * layers_sampled
    return process_bytes(work) + (held + sampled) * work.itemsize + _batch_bytes(work)


def generation_bytes(work: Workload, *, rows: int) -> int:
    """One worker with the whole model, the keys and values of its rows, and two copies of their logits."""
    keys = rows * work.recipe.calibration.row_length * work.num_blocks * 2 * work.shape.hidden_size
    logits = 3 * rows * work.num_logits * FLOAT32_BYTES
    return process_bytes(work) + (work.num_elements + keys) * work.itemsize + logits


def _batch_bytes(work: Workload) -> int:
    """One batch in a block whose FFN is observed."""
    hidden, neurons = work.shape.hidden_size, work.shape.num_neurons
    of_token = hidden * (10 * work.itemsize + 2 * FLOAT32_BYTES) + neurons * (
        3 * work.itemsize + 2 * FLOAT32_BYTES + 1
    )
    return work.batch_tokens * of_token


def compression_bytes(work: Workload) -> int:
    """One layer's FFN in float32 (original, split and compressed), and the inputs it is fitted to."""
    shape, tokens = work.shape, work.sampled_tokens
    weights = int(shape.num_elements * FLOAT32_BYTES * (2 + 2 * work.kept))
    num_copies = 4 if work.recipe.refits else 2  # inputs and outputs; refits need the compressed model's too
    inputs = tokens * shape.hidden_size * FLOAT32_BYTES * num_copies
    chunk = min(tokens, CHUNK_TOKENS) * (4 * shape.num_neurons + 4 * shape.hidden_size) * FLOAT32_BYTES
    steps = (*work.recipe.steps, *work.recipe.refits)
    most = max((step.memory_bytes(work.of_layer) for step in steps), default=0)
    if (last := work.recipe.after_healing) is not None:
        most = max(most, last.memory_bytes(work.of_layer))
    return process_bytes(work) + weights + inputs + chunk + most


def measurement_bytes(work: Workload, *, block_by_block: bool) -> int:
    """Both models whole, or one block and what lies outside the blocks of both."""
    if block_by_block:
        held = 2 * work.outside_elements + work.block_elements
    else:
        held = int(work.num_elements * (1 + work.compressed_bytes / work.file_bytes))
    logits = work.compared_tokens * work.num_logits * FLOAT32_BYTES * LOGIT_COPIES
    return process_bytes(work) + held * work.itemsize + _batch_bytes(work) + logits


def peak_memory_bytes(work: Workload) -> int:
    """The process that waits, and the one that loads the model and runs it once."""
    rows = max(rows * length for rows, length in work.recipe.measurement.latency_shapes)
    model = work.num_elements * work.itemsize + rows * work.num_logits * FLOAT32_BYTES
    return process_bytes(work) + PROCESS_BYTES + model


def healing_bytes(work: Workload) -> int:
    """Teacher, student, gradients and the optimizer's two moments, in float32."""
    student = work.num_elements * work.compressed_bytes / work.file_bytes
    return (
        process_bytes(work) + int((work.num_elements + 5 * student) * FLOAT32_BYTES) + 3 * _batch_bytes(work)
    )


def tables_bytes(work: Workload, *, device: str) -> int:
    """The original, the logits of both models, and what every block gave."""
    tokens = max(TABLE_TOKENS[device], work.recipe.calibration.row_length)
    states = tokens * work.shape.hidden_size * work.num_blocks
    logits = 2 * tokens * work.num_logits * work.itemsize + 2 * KL_ROWS * work.num_logits * FLOAT32_BYTES
    return process_bytes(work) + (work.num_elements + states) * work.itemsize + logits + _batch_bytes(work)
