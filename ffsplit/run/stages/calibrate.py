"""Calibration: each worker holds the model and turns shards of text into neuron statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ffsplit.calibration.hooks import Observed, Sampling, observe
from ffsplit.calibration.readers import Reader, make_reader
from ffsplit.calibration.sampling import MAX_SAMPLED_SHARDS, CalibrationSettings, shard
from ffsplit.calibration.statistics_file import write_statistics
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.directories import temporary_folder
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_base_model
from ffsplit.models.streamed import StreamedModel
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution


@dataclass(frozen=True)
class Shard:
    """Some rows of calibration text."""

    index: int
    rows: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}"


class CalibrationJob(Record):
    """Everything that a calibration worker needs except its shards."""

    model: ModelSource
    settings: CalibrationSettings
    num_shards: int
    seed: int
    lineage: dict[str, str]
    profile: ComputeProfile
    scratch: Scratch
    inputs_only: bool = False
    """Sample FFN inputs only: the statistics exist already."""
    block_by_block: bool = False
    """Hold one block of the model at a time. The results are the same bytes."""

    def num_sampled(self, shard: int) -> int:
        """How many tokens of a shard have their FFN inputs sampled."""
        step = max(1, -(-self.num_shards // MAX_SAMPLED_SHARDS))
        num_sampled_shards = -(-self.num_shards // step)
        return -(-self.settings.sampled_tokens // num_sampled_shards) if shard % step == 0 else 0


class CalibrationWorker:
    """Holds the model, which is loaded for the first shard that is not finished yet."""

    def __init__(self, job: CalibrationJob) -> None:
        self._job = job

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return self._job.model.checkpoint(uneven=True)

    @cached_property
    def _reader(self) -> Reader:
        settings = self._job.settings
        return make_reader(
            self._checkpoint, max_length=settings.row_length, batch_tokens=settings.batch_tokens
        )

    @cached_property
    def _model(self) -> Any:
        profile, checkpoint = self._job.profile, self._checkpoint
        device, dtype = torch.device(profile.device), getattr(torch, profile.dtype)
        if self._job.block_by_block:
            return StreamedModel(checkpoint, device=device, dtype=dtype)
        return load_base_model(checkpoint, device=device, dtype=dtype)

    def __call__(self, shard: Shard) -> Result:
        """Statistics and sampled inputs of one shard, in the scratch."""
        with self._job.profile.applied():
            return self._job.scratch.load_or_compute(shard.name, lambda: self._collect(shard))

    def _collect(self, shard: Shard) -> Result:
        job = self._job
        rows = self._reader.encode(shard.rows)
        num_tokens = self._reader.num_tokens(rows)
        sampling = Sampling(partial(self._sampled, shard), num_tokens, len(rows))
        observed = observe(
            self._model,
            self._checkpoint.ffns,
            list(self._reader.batches(rows)),
            sampling=sampling,
            inputs_only=job.inputs_only,
        )
        return self._save(shard, observed, num_tokens=sum(num_tokens.values()), num_rows=len(rows))

    def _sampled(self, shard: Shard, num_tokens: int) -> torch.Tensor:
        """The ascending positions of the tokens of a shard whose FFN inputs are sampled."""
        count = min(num_tokens, self._job.num_sampled(shard.index))
        generator = torch.Generator().manual_seed(self._job.seed * 1_000_003 + shard.index)
        return torch.randperm(num_tokens, generator=generator)[:count].sort().values

    def _save(self, shard: Shard, observed: Iterable[Observed], *, num_tokens: int, num_rows: int) -> Result:
        with temporary_folder() as folder:
            files = {}
            statistics = []
            for index, (stats, inputs) in enumerate(observed):
                statistics.append(stats)
                if inputs is not None:
                    path = folder / f"layer-{index:03d}.safetensors"
                    save_file({each: tensor.contiguous() for each, tensor in inputs.items()}, path)
                    files[f"inputs/{path.stem}/{shard.name}.safetensors"] = path
            if not self._job.inputs_only:
                path = folder / f"{shard.name}.parquet"
                lineage = {**self._job.lineage, "shard": str(shard.index)}
                write_statistics(path, tuple(each for each in statistics if each), lineage=lineage)
                files = {path.name: path} | files
            if not num_tokens:  # without a mask, every position is a token
                num_tokens = max((each.num_tokens for each in statistics if each), default=0)
            facts = {"index": shard.index, "num_tokens": num_tokens, "num_rows": num_rows}
            return self._job.scratch.save(shard.name, files, facts=facts)


def calibrate(execution: Execution) -> list[Result]:
    """Statistics and sampled FFN inputs of every shard; only the inputs if statistics are reused."""
    run = execution.run
    if run.origin is not None:
        return sample_inputs(execution, execution.model, part="calibrate", key=run.keys.statistics)
    job, shards = _calibration(execution, execution.model, part="calibrate")
    answers = execution.runner.map_workers("calibrate", partial(CalibrationWorker, job), shards)
    return execution.log.collect("calibrate", run.keys.statistics, len(shards), answers)


def sample_inputs(execution: Execution, model: ModelSource, *, part: str, key: str) -> list[Result]:
    """Only the FFN inputs of the sampled tokens, of the original or of a compressed model."""
    job, shards = _calibration(execution, model, part=part, inputs_only=True)
    shards = [each for each in shards if job.num_sampled(each.index)]
    answers = execution.runner.map_workers("sample", partial(CalibrationWorker, job), shards)
    return execution.log.collect("sample", key, len(shards), answers)


def _calibration(
    execution: Execution, model: ModelSource, *, part: str, inputs_only: bool = False
) -> tuple[CalibrationJob, list[Shard]]:
    run, settings = execution.run, execution.run.recipe.calibration
    groups = shard(execution.text.calibration, shard_size=settings.rows_per_shard)
    job = CalibrationJob(
        model=model,
        settings=settings,
        num_shards=len(groups),
        seed=run.config.seed,
        lineage=run.lineage,
        profile=run.profile,
        scratch=execution.scratch.part(part),
        inputs_only=inputs_only,
        block_by_block=run.needs.block_by_block,
    )
    return job, [Shard(index, rows) for index, rows in enumerate(groups)]


def input_files(shards: Sequence[Result], unit: int) -> list[FileEntry]:
    """The sampled inputs of one FFN, or of a block's experts, in shard order."""
    folder = f"/inputs/layer-{unit:03d}/"
    return [entry for result in shards for entry in result.files if folder in entry.path]


def statistics_file(result: Result) -> FileEntry:
    """The statistics of one shard."""
    (entry,) = (entry for entry in result.files if entry.path.endswith(".parquet"))
    return entry
