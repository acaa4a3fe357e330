"""The healing stage: one worker or several that share every step; it can go on from its own checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit.artifacts.scratch import Result, Scratch
from ffsplit.calibration.batches import pad_id_of, tokenize_rows
from ffsplit.compressors.quantize import QuantizeCompressor
from ffsplit.config import Record
from ffsplit.healing.heal import HealingData, fake_quantized, heal, settle
from ffsplit.healing.settings import HealingSettings
from ffsplit.healing.state import HealingState
from ffsplit.healing.team import Team, find_team
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_tokenizer, load_whole_model
from ffsplit.models.source import ModelSource
from ffsplit.runtime.linears import attention_linears
from ffsplit.stages.profile import ComputeProfile
from ffsplit.temporary import temporary_folder

RESULT, PROGRESS = "healed", "progress"


class HealJob(Record):
    """What to heal, on which text. The compressed checkpoint has its original's names."""

    original: ModelSource
    compressed: ModelSource
    rows: tuple[str, ...]
    validation: tuple[str, ...]
    max_length: int
    batch_tokens: int
    seed: int
    settings: HealingSettings
    quantization: QuantizeCompressor | None
    linears: Literal["kept", "int8"]
    scratch: Scratch
    profile: ComputeProfile
    threads: int
    workers: int


def heal_job(job: HealJob) -> Result | None:
    """Heal the compressed model; its new weights are one safetensors file in the scratch.

    Of several workers that are called at once, only the first one writes and answers.
    """
    team = find_team(job.workers)
    with job.profile.applied(threads=job.threads):
        if 0 in team.mine:
            return job.scratch.load_or_compute(RESULT, lambda: _save(job.scratch, *_heal(job, team)))
        if job.scratch.load(RESULT) is None:
            _heal(job, team)
        return None


def _heal(job: HealJob, team: Team) -> tuple[Any, Checkpoint, HealingState, list[nn.Module]]:
    """The healed student, the checkpoint it came from, how it went, and its layers that are on a grid."""
    original = open_checkpoint(job.original.directory())
    compressed = open_checkpoint(job.compressed.directory(), uneven=True)
    device = torch.device(job.profile.device)
    teacher, student = (
        load_whole_model(each.directory, original.class_name, dtype=torch.float32).to(device)
        for each in (original, compressed)
    )
    rounded = _round(student, compressed, job)
    tokenizer = load_tokenizer(original)
    rows, validation = (
        tokenize_rows(tokenizer, texts, max_length=job.max_length) for texts in (job.rows, job.validation)
    )
    data = HealingData(rows, validation, pad_id_of(original, tokenizer), job.batch_tokens)
    state = heal(
        student,
        teacher,
        data,
        kind=original.compared_as,
        settings=job.settings,
        seed=job.seed,
        resume=lambda weights, optimizer: _resume(job.scratch, weights, optimizer),
        checkpoint=partial(_checkpoint, job.scratch) if 0 in team.mine else _keep_nothing,
        team=team,
    )
    settle(rounded)
    return student, compressed, state, rounded


def _round(student: Any, checkpoint: Checkpoint, job: HealJob) -> list[nn.Module]:
    """Let the student compute with the integers that it ends with; the linear layers that have them."""
    if job.quantization is None:
        return []
    base = getattr(student, student.base_model_prefix, student)
    num_bits, group_size = job.quantization.num_bits, job.quantization.group_size
    rounded: list[nn.Module] = []
    for ffn in checkpoint.ffns:
        paths = [path for path in (ffn.paths.up, ffn.paths.gate, ffn.paths.down) if path is not None]
        linears = [base.get_submodule(f"{ffn.block}.{path}") for path in dict.fromkeys(paths)]
        fake_quantized(linears, num_bits=num_bits, group_size=group_size, transposed=ffn.paths.transposed)
        rounded += linears
    if job.linears == "int8":
        linears = [base.get_submodule(path) for path in attention_linears(checkpoint)]
        fake_quantized(linears, num_bits=8, group_size=None)
        rounded += linears
    return rounded


def _resume(scratch: Scratch, weights: dict[str, Tensor], optimizer: Any) -> HealingState | None:
    record = scratch.load(PROGRESS)
    return None if record is None else HealingState.load(scratch.path(record.files[0]), weights, optimizer)


def _checkpoint(scratch: Scratch, state: HealingState, weights: dict[str, Tensor], optimizer: Any) -> None:
    with temporary_folder() as folder:
        path = folder / f"{PROGRESS}.safetensors"
        state.save(path, weights, optimizer)
        scratch.save(PROGRESS, {path.name: path}, facts={"step": state.step})


def _keep_nothing(state: HealingState, weights: dict[str, Tensor], optimizer: Any) -> None:
    """Another worker has the same state, and writes it."""


def _save(
    scratch: Scratch,
    student: Any,
    checkpoint: Checkpoint,
    state: HealingState,
    rounded: Sequence[nn.Module] = (),
) -> Result:
    """The student's tensors, under the checkpoint's names and in its dtypes.

    Matrices that are about to become integers stay float32: in 16 bits they would be off the grid that
    healing has judged them on, and might round to other integers.
    """
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    on_grid = {id(linear.weight) for linear in rounded}
    wide = {name for name, parameter in student.named_parameters() if id(parameter) in on_grid}
    tensors = {
        name: tensor.to(
            "cpu", torch.float32 if name in wide else dtypes[checkpoint.tensors[name].dtype]
        ).contiguous()
        for name, tensor in student.state_dict().items()
        if name in checkpoint.tensors and checkpoint.tensors[name].dtype in dtypes
    }
    with temporary_folder() as folder:
        path = folder / f"{RESULT}.safetensors"
        save_file(tensors, path)
        facts: dict[str, JsonValue] = {
            "num_steps": state.step,
            "best_step": state.best_step,
            "first_loss": state.first_loss,
            "best_loss": state.best_loss,
        }
        return scratch.save(RESULT, {path.name: path}, facts=facts)
