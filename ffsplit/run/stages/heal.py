"""Healing, by one worker or by several that share every step. It resumes from its own checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit import logs
from ffsplit.calibration.model_inputs import Batch, pad_id_of, padded_batches, tokenize_rows
from ffsplit.compat.transformers import names_read
from ffsplit.compressors.quantize import QuantizeCompressor
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.directories import temporary_folder
from ffsplit.errors import UnsupportedModelError
from ffsplit.healing.loop import HealingState, fake_quantized, heal, settle, trainable_weights
from ffsplit.healing.losses import last_states, logits_of
from ffsplit.healing.rows import HealingData
from ffsplit.healing.settings import HealingSettings
from ffsplit.healing.team import Team, Together, find_team
from ffsplit.keys import stage_key
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.family import Makes
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_tokenizer, load_whole_model
from ffsplit.models.names import base_of
from ffsplit.models.tensor_files import FLOATS
from ffsplit.runtime.attention_int8 import attention_linears
from ffsplit.store.beacon import Beacon
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution

RESULT, PROGRESS = "healed", "progress"


class HealJob(Record):
    """What to heal, on which text. The compressed checkpoint has the original's tensor names."""

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

    @property
    def beacon(self) -> Beacon:
        """Where the first worker tells how far it is."""
        return Beacon(scratch=self.scratch, name="heal")


def heal_job(job: HealJob) -> Result | None:
    """Heal the compressed model; its new weights are one safetensors file in the scratch.

    Of several workers, only the first writes and returns a result.
    """
    team = find_team(job.workers)
    with job.profile.applied(threads=job.threads):
        if 0 in team.mine:
            return job.scratch.load_or_compute(RESULT, lambda: _save(job.scratch, *_heal(job, team)))
        if job.scratch.load(RESULT) is None:
            _heal(job, team)
        return None


def _heal(job: HealJob, team: Team) -> tuple[dict[str, Tensor], HealingState]:
    """The healed tensors as they are stored, and the final state. Divided models' tensors go to the first."""
    original = job.original.checkpoint()
    compressed = job.compressed.checkpoint(uneven=True)
    device = torch.device(job.profile.device)
    tokenizer = load_tokenizer(original)
    rows, validation = (
        tokenize_rows(tokenizer, texts, max_length=job.max_length) for texts in (job.rows, job.validation)
    )
    data = HealingData(rows, validation, pad_id_of(original, tokenizer), job.batch_tokens)
    one = next(padded_batches(rows[:1], batch_tokens=job.max_length, pad_id=data.pad_id)).to(device)
    fast = device.type == "cuda" and job.settings.mixed_precision == "bf16"
    dtype = torch.bfloat16 if fast else torch.float32
    train = partial(heal, makes=original.compared_as, settings=job.settings, seed=job.seed, team=team)
    if 0 in team.mine:
        train = partial(train, tell=job.beacon.teller())
    if is_divided(team, device):
        return _heal_divided(job, team, original, compressed, data, one, dtype=dtype, train=train)
    teacher, student = (
        load_whole_model(each.directory, original.class_name, dtype=kind).to(device)
        for each, kind in ((original, dtype), (compressed, torch.float32))
    )
    _freeze_left_out(student, compressed)
    check_written(student, compressed, one, makes=original.compared_as)
    rounded = _round(student, compressed, job)
    state = train(
        student,
        teacher,
        data,
        resume=lambda weights, optimizer: _resume(job.scratch, weights, optimizer),
        checkpoint=partial(_checkpoint, job.scratch) if 0 in team.mine else _keep_nothing,
    )
    settle(rounded)
    on_grid = {id(linear.weight) for linear in rounded}
    wide = frozenset(name for name, parameter in student.named_parameters() if id(parameter) in on_grid)
    return stored_tensors(student, compressed, wide=wide), state


def is_divided(team: Team, device: torch.device) -> bool:
    """Whether processes divide the models among them, rather than hold each of them whole.

    They do so on GPUs, always: it is faster there than to exchange whole gradients, and what is computed
    should not depend on how much memory a GPU has.
    """
    return device.type == "cuda" and isinstance(team, Together)


def _heal_divided(
    job: HealJob,
    team: Team,
    original: Checkpoint,
    compressed: Checkpoint,
    data: HealingData,
    batch: Batch,
    *,
    dtype: torch.dtype,
    train: Callable[..., HealingState],
) -> tuple[dict[str, Tensor], HealingState]:
    """The same with models that are divided among the processes."""
    from ffsplit.healing.sharded import Sharding, gathered

    device = torch.device(job.profile.device)
    teacher = Sharding(device).load(original, original.class_name, dtype=dtype, batch=batch)
    teacher.requires_grad_(False)
    names: dict[str, str] = {}
    rounded: list[nn.Module] = []

    def prepare(student: Any, block: str) -> None:
        if not names:
            names.update(_stored_names(student, compressed))
        rounded.extend(_round(student, compressed, job, block=block))

    # a grid's points need float32 until they are rounded; other weights are gathered as they are multiplied
    narrow = torch.bfloat16 if job.settings.mixed_precision == "bf16" and job.quantization is None else None
    sharding = Sharding(device, narrow)
    student = sharding.load(
        compressed, original.class_name, dtype=torch.float32, batch=batch, prepare=prepare
    )
    _freeze(student, compressed, names)
    with sharding.computing():
        check_parameters(student, compressed, names, batch, makes=original.compared_as)
    shard = f"{PROGRESS}-{team.mine[0]}-of-{team.size}"
    state = train(
        student,
        teacher,
        data,
        resume=lambda weights, optimizer: _resume_part(job.scratch, shard, weights, optimizer),
        checkpoint=partial(_checkpoint_part, job.scratch, shard),
        blocks=compressed.blocks,
    )
    values, wide = student.state_dict(), {id(module) for module in rounded}
    tensors = {}
    for stored, name in names.items():
        path, _, kind = name.rpartition(".")
        module = student.get_submodule(path)
        is_rounded = kind == "weight" and id(module) in wide
        value = gathered(values[f"{path}.parametrizations.weight.original" if is_rounded else name])
        if is_rounded:
            value = module.parametrizations.weight[0](value)
        if 0 in team.mine:
            tensors[stored] = _as_stored(value, compressed, stored, is_wide=is_rounded)
    return tensors, state


def _freeze_left_out(student: Any, checkpoint: Checkpoint) -> None:
    """The FFNs that a run leaves as they were are not trained."""
    _freeze(student, checkpoint, _stored_names(student, checkpoint))


def _freeze(student: Any, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    left_out = {
        name for ffn in checkpoint.left_out for name in (*ffn.tensor_names, *ffn.activation_tensors.values())
    }
    parameters = dict(student.named_parameters(remove_duplicate=False))
    for stored, name in names.items():
        if stored in left_out and name in parameters:  # activations have buffers too
            parameters[name].requires_grad_(False)


def _round(
    student: Any, checkpoint: Checkpoint, job: HealJob, *, block: str | None = None
) -> list[nn.Module]:
    """Let the student compute with the integers that it will be stored with. Returns those linear layers.

    All of them, or those of a block.
    """
    if job.quantization is None:
        return []
    base = base_of(student)
    num_bits, group_size = job.quantization.num_bits, job.quantization.group_size
    rounded: list[nn.Module] = []
    for ffn in checkpoint.ffns:
        if block not in (None, ffn.block):
            continue
        paths = [path for path in (ffn.paths.up, ffn.paths.gate, ffn.paths.down) if path is not None]
        linears = [base.get_submodule(f"{ffn.block}.{path}") for path in dict.fromkeys(paths)]
        fake_quantized(linears, num_bits=num_bits, group_size=group_size, transposed=ffn.paths.transposed)
        rounded += linears
    if job.linears == "int8":
        of_block = "" if block is None else f"{block}."
        linears = [
            base.get_submodule(path) for path in attention_linears(checkpoint) if path.startswith(of_block)
        ]
        fake_quantized(linears, num_bits=8, group_size=None)
        rounded += linears
    return rounded


def _resume(scratch: Scratch, weights: dict[str, Tensor], optimizer: Any) -> HealingState | None:
    record = scratch.load_newest(PROGRESS)
    if record is None:
        return None
    with scratch.reading(record.files[0]) as path:
        state = HealingState.load(path, weights, optimizer)
    logs.log("resumed", step=state.step)
    return state


def _checkpoint(scratch: Scratch, state: HealingState, weights: dict[str, Tensor], optimizer: Any) -> None:
    with temporary_folder() as folder:
        path = folder / f"{PROGRESS}.safetensors"
        state.save(path, weights, optimizer)
        scratch.save_next(PROGRESS, state.step, path)


def _keep_nothing(state: HealingState, weights: dict[str, Tensor], optimizer: Any) -> None:
    """Do nothing: another worker has the same state and writes it."""


def _checkpoint_part(
    scratch: Scratch, shard: str, state: HealingState, weights: dict[str, Tensor], optimizer: Any
) -> None:
    """Store this process's part, and remove the earlier one when all processes have stored theirs."""
    from torch import distributed

    with temporary_folder() as folder:
        path = folder / f"{PROGRESS}.safetensors"
        state.save(path, weights, optimizer)
        scratch.save_numbered(shard, state.step, path)
    distributed.barrier()
    scratch.drop_older(shard, state.step)


def _resume_part(
    scratch: Scratch, shard: str, weights: dict[str, Tensor], optimizer: Any
) -> HealingState | None:
    """Resume from the newest step of which every process has its part."""
    for step in reversed(_in_all(scratch.numbers(shard))):
        record = scratch.load_numbered(shard, step)
        if step not in _in_all([] if record is None else [step]):
            continue
        assert record is not None, "it is in this process's list"
        with scratch.reading(record.files[0]) as path:
            state = HealingState.load(path, weights, optimizer)
        logs.log("resumed", step=state.step)
        return state
    return None


def _in_all(numbers: Collection[int]) -> list[int]:
    """The numbers that every process has, in order."""
    from torch import distributed

    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, sorted(numbers))
    return sorted(set(everyones[0]).intersection(*everyones[1:]))


def _save(scratch: Scratch, tensors: dict[str, Tensor], state: HealingState) -> Result:
    """Save the healed tensors and the record of the training."""
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


def stored_tensors(student: Any, checkpoint: Checkpoint, *, wide: Collection[str] = ()) -> dict[str, Tensor]:
    """A model's floating-point tensors, under the names and in the dtypes of the checkpoint's files.

    Parameters of the model named in `wide` are float32: matrices that will be quantized. In 16 bits they
    would leave the grid that they were healed on, and might round to other integers.
    """
    values: dict[str, Tensor] = student.state_dict()
    return {
        stored: _as_stored(values[name], checkpoint, stored, is_wide=name in wide)
        for stored, name in _stored_names(student, checkpoint).items()
    }


def _as_stored(value: Tensor, checkpoint: Checkpoint, stored: str, *, is_wide: bool) -> Tensor:
    dtype = torch.float32 if is_wide else FLOATS[checkpoint.tensors[stored].dtype]
    return value.detach().to("cpu", dtype).contiguous()


def _stored_names(student: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Stored names to the model's names, for floating-point tensors that both hold in the same form."""
    read = names_read(student, checkpoint.tensors)
    return {
        stored: found.name
        for stored, found in read.items()
        if found is not None and found.is_whole and checkpoint.tensors[stored].dtype in FLOATS
    }


def check_written(student: Any, checkpoint: Checkpoint, batch: Batch, *, makes: Makes) -> None:
    """Raise UnsupportedModelError if healing would train a parameter that the files have no tensor for.

    A parameter that a batch's outputs do not depend on, such as a newly initialized pooler, is not trained.
    """
    check_parameters(student, checkpoint, _stored_names(student, checkpoint), batch, makes=makes)


def check_parameters(
    student: Any, checkpoint: Checkpoint, names: Mapping[str, str], batch: Batch, *, makes: Makes
) -> None:
    """`check_written`, given the model's names of stored tensors. Rounded weights have names of their own."""
    parameters = dict(student.named_parameters(remove_duplicate=False))
    renamed = {name.removesuffix("weight") + "parametrizations.weight.original" for name in names.values()}
    written = parameters.keys() & {*names.values(), *renamed}
    stored = {id(parameters[name]) for name in written}
    unstored = {name: each for name, each in trainable_weights(student).items() if id(each) not in stored}
    if not unstored:
        return
    outputs = last_states(student, batch) if makes == "states" else logits_of(student, batch)
    torch.autograd.backward(outputs.sum())
    lost = [name for name, parameter in unstored.items() if parameter.grad is not None]
    student.zero_grad(set_to_none=True)
    if lost:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: healing would train {lost[0]} ({len(lost)} such tensors), which the "
            "checkpoint's files store in another form: load the original and save it with save_pretrained"
        )


def heal_checkpoint(execution: Execution, settings: HealingSettings, compressed: Path) -> Path:
    """Heal the checkpoint in a directory. Returns a file with its new weights."""
    run, text, calibration = execution.run, execution.text, execution.run.recipe.calibration
    threads = run.healing_threads
    job = HealJob(
        original=execution.model,
        compressed=execution.hand_over(compressed),
        rows=text.calibration,
        validation=(*text.validation, *text.own_validation) or text.held_out,
        max_length=calibration.row_length,
        batch_tokens=calibration.compared_tokens,
        seed=run.config.seed,
        settings=settings,
        quantization=run.recipe.healed_for,
        linears=run.recipe.linears,
        scratch=execution.scratch.part("heal"),
        profile=run.profile,
        threads=threads,
        workers=run.config.healing_workers,
    )
    with execution.log.stage(
        "heal",
        stage_key("heal", {"run": run.keys.run}),
        num_items=1,
        beacon=job.beacon,
        workers=job.workers,
        threads=threads,
    ):
        healed = execution.runner.run_together("heal", heal_job, job, size=job.workers, threads=threads)
    assert healed is not None, "the first worker returns the result"
    return execution.scratch.path(healed.files[0])
