"""The memory that healing takes on a GPU, whole or divided among several: an estimate on the high side."""

from __future__ import annotations

from ffsplit.compressors.base import FLOAT32_BYTES
from ffsplit.healing.gradient import MEASURED_TOKENS
from ffsplit.healing.losses import CHUNK_LOGITS
from ffsplit.run.workload import Workload

LIBRARIES_BYTES = 3_000_000_000
"""CUDA's and NCCL's own memory, and what the allocator cannot use."""
LOGIT_COPIES = 6
"""Copies of a chunk of both models' logits: raw, as log-probabilities, and intermediate results."""
TRAINED_COPIES = 4
"""Of each trained weight, in float32: itself, its gradient and two moments. The best state is a fifth."""
MOST_GPUS = 64


def bytes_of_a_gpu(work: Workload, *, workers: int) -> int:
    """Bytes that each of `workers` GPUs needs. One alone holds both models whole, and the best state too.

    Several hold their parts, the embedding tables whole, two blocks and the head as they are gathered, and
    the blocks' inputs rather than all activations; the best state is in the hosts' memory.
    """
    settings, shape = work.recipe.healing, work.shape
    assert settings is not None, "only for recipes that heal"
    in_bfloat16 = settings.mixed_precision == "bf16"
    itemsize = 2 if in_bfloat16 else FLOAT32_BYTES
    tables = round(work.num_elements - (1 - work.kept) * work.ffn_elements) - work.trainable_elements
    neurons = round(work.kept * shape.num_neurons)
    of_block = shape.hidden_size * (44 if in_bfloat16 else 64) + neurons * 5 * itemsize
    tokens = max(MEASURED_TOKENS, work.recipe.calibration.row_length)
    logits = min(CHUNK_LOGITS, tokens * work.num_logits) * FLOAT32_BYTES * LOGIT_COPIES
    fixed = LIBRARIES_BYTES + logits + tables * (FLOAT32_BYTES + itemsize)
    teacher = (work.num_elements - tables) * itemsize
    if workers == 1:
        trained = work.trainable_elements * FLOAT32_BYTES * (TRAINED_COPIES + 1)
        return fixed + trained + teacher + tokens * work.num_blocks * of_block
    trained = work.trainable_elements * FLOAT32_BYTES * TRAINED_COPIES
    student_block = work.block_elements - round((1 - work.kept) * work.ffn_elements / work.num_blocks)
    gathered = 2 * (work.block_elements * itemsize + student_block * (itemsize + FLOAT32_BYTES))
    gathered += work.num_logits * shape.hidden_size * (2 * itemsize + FLOAT32_BYTES)
    if work.recipe.after_healing is not None:  # gathered in float32, and autocast keeps what it made of them
        gathered += (work.trainable_elements + student_block) * itemsize
    kept_inputs = tokens * (work.num_blocks * shape.hidden_size * FLOAT32_BYTES + of_block)
    return fixed + (trained + teacher) // workers + gathered + kept_inputs


def fewest_gpus(work: Workload, *, available: int) -> int | None:
    """How many GPUs with this many bytes can heal together, one at least; None if none can."""
    return next(
        (each for each in range(1, MOST_GPUS + 1) if bytes_of_a_gpu(work, workers=each) <= available), None
    )
