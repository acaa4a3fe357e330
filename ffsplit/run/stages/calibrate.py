"""Calibration: each worker holds the model and turns shards of text into neuron statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from ffsplit.calibration.hooks import Observed, Sampling, observe
from ffsplit.calibration.readers import Reader, make_reader
from ffsplit.calibration.sampling import MAX_SAMPLED_SHARDS, CalibrationSettings, shard
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import statistics_bytes
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_base_model
from ffsplit.models.streamed import StreamedModel
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution


GPU_SAVING_THREADS = 8
"""Threads that write a shard's files: a GPU reads a shard in less time than one thread writes it."""

GPU_LANES = 3
"""Shards that a worker on a GPU has in hand: one is in the model, the others are tokenized or written."""


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

    @property
    def lanes(self) -> int:
        """How many shards a worker has in hand at once."""
        return GPU_LANES if self.profile.device == "cuda" and not self.block_by_block else 1

    def num_sampled(self, shard: int) -> int:
        """How many tokens of a shard have their FFN inputs sampled."""
        step = max(1, -(-self.num_shards // MAX_SAMPLED_SHARDS))
        num_sampled_shards = -(-self.num_shards // step)
        return -(-self.settings.sampled_tokens // num_sampled_shards) if shard % step == 0 else 0


class CalibrationWorker:
    """Holds the model, which is loaded for the first shard that is not finished yet.

    On a GPU several threads call it: while one shard is in the model, others are tokenized and written.
    """

    def __init__(self, job: CalibrationJob) -> None:
        self._job = job
        self._reading, self._running = threading.Lock(), threading.Lock()

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return self._job.model.checkpoint(uneven=True)

    @cached_property
    def _reader(self) -> Reader:
        settings = self._job.settings
        return make_reader(
            self._checkpoint, max_length=settings.row_length, batch_tokens=settings.tokens_per_batch
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
        with self._reading:  # tokenizers do not allow two calls at once
            rows = self._reader.encode(shard.rows)
            num_tokens = self._reader.num_tokens(rows)
            batches = list(self._reader.batches(rows))
        sampling = Sampling(partial(self._sampled, shard), num_tokens, len(rows))
        with self._running:
            observed: Iterable[Observed] = observe(
                self._model, self._checkpoint.ffns, batches, sampling=sampling, inputs_only=job.inputs_only
            )
            if not job.block_by_block:  # else each block is run when its results are about to be saved
                observed = list(observed)
        return self._save(shard, observed, num_tokens=sum(num_tokens.values()), num_rows=len(rows))

    def _sampled(self, shard: Shard, num_tokens: int) -> torch.Tensor:
        """The ascending positions of the tokens of a shard whose FFN inputs are sampled."""
        count = min(num_tokens, self._job.num_sampled(shard.index))
        generator = torch.Generator().manual_seed(self._job.seed * 1_000_003 + shard.index)
        return torch.randperm(num_tokens, generator=generator)[:count].sort().values

    def _save(self, shard: Shard, observed: Iterable[Observed], *, num_tokens: int, num_rows: int) -> Result:
        statistics: list[NeuronStats | None] = []

        def files() -> Iterator[tuple[str, Callable[[], bytes]]]:
            for index, (stats, inputs) in enumerate(observed):
                statistics.append(stats)
                if inputs is not None:
                    tensors = {each: tensor.contiguous() for each, tensor in inputs.items()}
                    yield f"inputs/layer-{index:03d}/{shard.name}.safetensors", partial(save, tensors)
            if not self._job.inputs_only:
                lineage = {**self._job.lineage, "shard": str(shard.index)}
                layers = tuple(each for each in statistics if each)
                yield f"{shard.name}.parquet", partial(statistics_bytes, layers, lineage=lineage)

        num_threads = GPU_SAVING_THREADS if self._job.profile.device == "cuda" else 1
        entries = self._job.scratch.put_each(files(), num_threads=num_threads)
        if not num_tokens:  # without a mask, every position is a token
            num_tokens = max((each.num_tokens for each in statistics if each), default=0)
        facts = {"index": shard.index, "num_tokens": num_tokens, "num_rows": num_rows}
        return self._job.scratch.record(shard.name, entries, facts=facts)


def calibrate(execution: Execution) -> list[Result]:
    """Statistics and sampled FFN inputs of every shard; only the inputs if statistics are reused."""
    run = execution.run
    if run.origin is not None:
        return sample_inputs(execution, execution.model, part="calibrate", key=run.keys.statistics)
    job, shards = _calibration(execution, execution.model, part="calibrate")
    factory = partial(CalibrationWorker, job)
    answers = execution.runner.map_workers("calibrate", factory, shards, lanes=job.lanes)
    return execution.log.collect("calibrate", run.keys.statistics, len(shards), answers)


def sample_inputs(execution: Execution, model: ModelSource, *, part: str, key: str) -> list[Result]:
    """Only the FFN inputs of the sampled tokens, of the original or of a compressed model."""
    job, shards = _calibration(execution, model, part=part, inputs_only=True)
    shards = [each for each in shards if job.num_sampled(each.index)]
    factory = partial(CalibrationWorker, job)
    answers = execution.runner.map_workers("sample", factory, shards, lanes=job.lanes)
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
