"""Text that the model writes itself, sampled at temperature 1: calibration rows without any data.

Each shard is one Parquet file of rows. Its bytes depend on the model, the settings and the kind of hardware,
not on which worker wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ffsplit.calibration.model_inputs import ordinary_ids, pad_id_of
from ffsplit.compat.transformers import has_static_cache
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Record
from ffsplit.directories import temporary_folder
from ffsplit.errors import FFSplitError, explained
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.fetch import ModelSource
from ffsplit.models.load import load_tokenizer, load_whole_model
from ffsplit.run.workload import rows_at_once
from ffsplit.store.scratch import Result, Scratch

if TYPE_CHECKING:
    from ffsplit.run.execution import Execution

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels without cuDNN's, which plan anew for each length, and so for each token."""
ADVICE = "give --calibration FILE:1, so that it writes none"
SCHEMA_VERSION = 1
SEED_STEP, SECOND_SEED = 1_000_003, 1 << 40


@dataclass(frozen=True)
class OwnShard:
    """Some rows to be written."""

    index: int
    num_rows: int

    @property
    def name(self) -> str:
        return f"own-{self.index:05d}"


class GenerateJob(Record):
    """Everything that a worker needs to write rows, except which shard."""

    model: ModelSource
    row_length: int
    seed: int
    lineage: dict[str, str]
    profile: ComputeProfile
    scratch: Scratch


class Writer:
    """Holds the model, which is loaded for the first shard that is not finished yet."""

    def __init__(self, job: GenerateJob) -> None:
        self._job = job

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return self._job.model.checkpoint(uneven=True)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._checkpoint)

    @cached_property
    def _model(self) -> Any:
        profile, checkpoint = self._job.profile, self._checkpoint
        dtype = getattr(torch, profile.dtype)
        return load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=dtype).to(profile.device)

    def __call__(self, shard: OwnShard) -> Result:
        """The rows of one shard, in the scratch."""
        with self._job.profile.applied():
            return self._job.scratch.load_or_compute(shard.name, lambda: self._write(shard))

    def _write(self, shard: OwnShard) -> Result:
        job = self._job
        with explained("the model cannot write text", advice=ADVICE, kind=FFSplitError):
            ids = written_rows(
                self._model,
                self._tokenizer,
                shard.num_rows,
                num_tokens=job.row_length,
                pad_id=pad_id_of(self._checkpoint, self._tokenizer),
                seed=job.seed * SEED_STEP + shard.index,
            )
        texts = [text.strip() for text in self._tokenizer.batch_decode(ids)]
        with temporary_folder() as folder:
            path = folder / f"{shard.name}.parquet"
            write_rows(path, texts, lineage=job.lineage | {"shard": str(shard.index)})
            facts = {"index": shard.index, "num_rows": shard.num_rows, "num_tokens": ids.numel()}
            return job.scratch.save(shard.name, {path.name: path}, facts=facts)


def written_rows(
    model: Any, tokenizer: Any, num_rows: int, *, num_tokens: int, pad_id: int, seed: int
) -> Tensor:
    """Rows that a model writes: [num_rows, num_tokens].

    They begin with the tokenizer's start token, if it has one, which is left out here, and then with a random
    token: without it, rows would be variations of a few openings. If the tokenizer has a chat template, every
    second row begins as the turn of a user.
    """
    turn = torch.tensor(
        tokenizer(turn_of_user(tokenizer), add_special_tokens=False)["input_ids"][:num_tokens]
    )
    num_turns = num_rows // 2 if len(turn) else 0
    write = partial(sample_rows, model, bos_id=tokenizer.bos_token_id, pad_id=pad_id)
    begun = random_openings(tokenizer, num_rows - num_turns, seed=seed)
    if num_turns:  # all rows go on from the same length
        begun = write(begun, num_tokens=len(turn), seed=seed + SECOND_SEED)
        both = torch.empty(num_rows, len(turn), dtype=torch.long)
        both[::2], both[1::2] = begun, turn
        begun = both
    return write(begun, num_tokens=num_tokens, seed=seed)


def random_openings(tokenizer: Any, num_rows: int, *, seed: int) -> Tensor:
    """A random token for each row, none of them special: [num_rows, 1]."""
    ordinary = torch.tensor(ordinary_ids(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (num_rows, 1), generator=generator)]


def turn_of_user(tokenizer: Any) -> str:
    """What a chat has between an answer and the user's next words; empty without a chat template."""
    answer, question = "an answer that ends here", "a question that begins here"
    turns = [("user", "a question"), ("assistant", answer), ("user", question)]
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # no template, or one for other messages: rows then have random openings
        return ""
    return str(chat).partition(answer)[2].partition(question)[0]


@torch.inference_mode()
def sample_rows(
    model: Any, begun: Tensor, *, num_tokens: int, bos_id: int | None, pad_id: int, seed: int
) -> Tensor:
    """Sample a continuation of each row [rows, length], through the end of one text into the next.

    Returns token ids [rows, num_tokens], what was begun among them, and without the start token, which the
    model reads first if there is one. The temperature is 1: greedy decoding of logits plus Gumbel noise
    samples from their softmax exactly. `multinomial` would be the slowest step.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    if begun.shape[1] >= num_tokens:
        return begun[:, :num_tokens]
    skipped = 0 if bos_id is None else 1
    start = functional.pad(begun, (skipped, 0), value=bos_id or 0)
    config = GenerationConfig(
        do_sample=False,
        min_length=0,
        max_length=skipped + num_tokens,
        pad_token_id=pad_id,
        eos_token_id=None,
        use_cache=True,
    )
    config.bos_token_id = None
    if model.device.type == "cpu" and has_static_cache(model):
        # a cache that grows is copied at every token, which takes longer than all else
        config.cache_implementation, config.disable_compile = "static", True
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with sdpa_kernel(KERNELS):
            written = model.generate(
                start.to(model.device),
                attention_mask=torch.ones_like(start, device=model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_GumbelNoise(model.device, seed)]),
            )
    finally:
        model.generation_config = own
    rows: Tensor = written[:, skipped:].cpu()
    if rows.shape != (len(start), num_tokens):
        raise FFSplitError(f"the model wrote rows of {rows.shape[1]} tokens, not {num_tokens}")
    return rows


class _GumbelNoise:
    """Adds Gumbel noise to logits [rows, vocabulary], in float32."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waiting = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self._generator)
        return scores.float() - waiting.log()


def write_rows(path: Any, texts: Sequence[str], *, lineage: Mapping[str, str]) -> None:
    """Write rows of text as Parquet, whose bytes depend on the arguments alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {
        "ffsplit.schema_version": str(SCHEMA_VERSION),
        "ffsplit.lineage": json.dumps(dict(lineage), sort_keys=True),
    }
    schema = pa.schema([pa.field("text", pa.string(), nullable=False)], metadata=metadata)
    pq.write_table(pa.table([pa.array(texts, pa.string())], schema=schema), path, compression="zstd")


def read_rows(path: Any) -> list[str]:
    """The rows of one file, in their order."""
    import pyarrow.parquet as pq

    rows: list[str] = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    return rows


def with_own_text(execution: Execution) -> Execution:
    """The execution with the text that the model writes, if the run asks for it, beside the text it read."""
    run = execution.run
    if not run.own.total:
        return execution
    length = run.recipe.calibration.row_length
    most = rows_at_once(run.checkpoint, device=run.profile.device, row_length=length)
    sizes = [min(most, run.own.total - start) for start in range(0, run.own.total, most)]
    shards = [OwnShard(index, size) for index, size in enumerate(sizes)]
    job = GenerateJob(
        model=execution.model,
        row_length=length,
        seed=run.config.seed,
        lineage=run.lineage,
        profile=run.profile,
        scratch=execution.scratch.part("generate"),
    )
    answers = execution.runner.map_workers("generate", partial(Writer, job), shards)
    results = execution.log.collect("generate", run.keys.statistics, len(shards), answers)
    rows, numbers = [], run.own
    for result in results:
        with job.scratch.reading(result.files[0]) as path:
            rows += read_rows(path)
    first, second = numbers.held_out, numbers.held_out + numbers.validation
    text = run.text.with_own(calibration=rows[second:], validation=rows[first:second], held_out=rows[:first])
    return replace(execution, text=text)
