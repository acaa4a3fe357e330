"""Scores of causal language models: perplexity on running text, and tasks of the lm-evaluation-harness.

The harness is https://github.com/EleutherAI/lm-evaluation-harness, through the extra `eval`. Its task data
come from the Hugging Face hub. They are fetched before the run starts, so that an unavailable task costs
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.calibration.sources import lines
from ffsplit.config import Record
from ffsplit.errors import FFSplitError, did_you_mean, explained, reason_of
from ffsplit.keys import digest_of
from ffsplit.measurement.latency import vocab_size_of
from ffsplit.measurement.tasks.base import Score, longest_row, read_decoded, task_error, task_file
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import load_tokenizer, quiet_transformers

HEAD = "ForCausalLM"
LONGEST_WINDOW = 2048
"""Tokens, if the model reads more and no length is given: the length that papers use."""
LOGITS_AT_ONCE = 1 << 26


class Perplexity(Record):
    """Running text, cut into windows of `max_length` tokens; the last one may be shorter."""

    form: ClassVar[str] = "perplexity:file.txt"
    is_running_text: ClassVar[bool] = True
    kind: Literal["perplexity"] = "perplexity"
    name: str
    text: str
    max_length: int

    @classmethod
    def read(cls, spec: str, *, checkpoint: Checkpoint, max_length: int | None = None) -> Perplexity:
        """`perplexity:file.txt`, for a causal language model. Raises ConfigError if either does not fit."""
        if not checkpoint.class_name.endswith(HEAD):
            what = checkpoint.class_name or "a model without a head"
            raise task_error(spec, f"perplexity needs a causal language model (...{HEAD}), not {what}")
        file = task_file(spec, suffixes=(".txt",))
        if file.columns:
            raise task_error(spec, f"a .txt file has no columns; write perplexity:{file.path}")
        window = min(max_length or LONGEST_WINDOW, longest_row(checkpoint))
        if window < 2:
            raise task_error(spec, f"windows of {window} token predict nothing; give --max-length 2 or more")
        text = "".join(lines(read_decoded(file)))
        if len(tokenize_text(load_tokenizer(checkpoint), text.strip()[:4096])) < 2:
            raise task_error(spec, "the text is a single token, which predicts nothing; give more text")
        return cls(name=f"perplexity {file.path.name}", text=text, max_length=window)

    @property
    def digest(self) -> str:
        return digest_of({"text": self.text})

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)

    def score(self, model: Any, tokenizer: Any) -> tuple[Score, ...]:
        ids = tokenize_text(tokenizer, self.text)
        windows = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        value, num_tokens = windows_perplexity(model, windows)
        return (Score(self.name, "perplexity", value, num_tokens, higher_is_better=False),)


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the whole text, with the special tokens that the tokenizer adds around it."""
    with quiet_transformers():  # it would warn that the text is longer than the model reads
        ids: list[int] = tokenizer(text)["input_ids"]
    return ids


@torch.no_grad()
def windows_perplexity(model: Any, windows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """exp of the mean loss in nats, and the number of predicted tokens: all but the first of each window."""
    longest = max(map(len, windows))
    batch_tokens = max(longest, LOGITS_AT_ONCE // vocab_size_of(model))
    long_enough = [ids for ids in windows if len(ids) > 1]
    total, num_tokens = 0.0, 0
    for batch in padded_batches(long_enough, batch_tokens=batch_tokens, pad_id=0):
        batch = batch.to(model.device)
        is_target = batch.attention_mask[:, 1:].bool()
        targets = batch.input_ids[:, 1:][is_target]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        losses = functional.cross_entropy(logits[:, :-1][is_target].float(), targets, reduction="none")
        total += float(losses.sum(dtype=torch.float64))
        num_tokens += len(targets)
    loss = total / num_tokens
    try:
        return math.exp(loss), num_tokens
    except OverflowError:
        raise FFSplitError(f"the perplexity overflows: a mean loss of {loss:.4g} nats per token") from None


class HarnessTasks(Record):
    """Tasks of the harness, by name, and the harness's version."""

    form: ClassVar[str] = "lm-eval:task[,task]"
    is_running_text: ClassVar[bool] = False
    kind: Literal["lm-eval"] = "lm-eval"
    tasks: tuple[str, ...]
    version: str
    max_length: int

    @classmethod
    def read(cls, spec: str, *, checkpoint: Checkpoint, max_length: int | None = None) -> HarnessTasks:
        """`lm-eval:task[,task]`. Raises ConfigError when the extra, a task or its data is missing."""
        if not checkpoint.class_name.endswith(HEAD):
            what = checkpoint.class_name or "a model without a head"
            raise task_error(spec, f"lm-eval needs a causal language model (...{HEAD}), not {what}")
        tasks = tuple(name.strip() for name in spec.partition(":")[2].split(","))
        if not all(tasks):
            raise task_error(spec, "name its tasks: lm-eval:task[,task]")
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise task_error(spec, "lm-eval is not installed: pip install 'ffsplit[eval]'") from None
        with explained(f"cannot evaluate {spec}"):
            manager = TaskManager()
        for name in tasks:
            if name not in manager.all_tasks:
                hint = did_you_mean(name, manager.all_tasks)
                raise task_error(spec, f"lm-eval has no task {name!r}{hint}")
        try:
            manager.load(list(tasks))
        except Exception as error:  # the hub, the network and every data set have errors of their own
            why = f"{type(error).__name__}: {reason_of(error)}"
            raise task_error(
                spec, f"its data cannot be fetched ({why}); check the network and HF_TOKEN"
            ) from error
        return cls(tasks=tasks, version=lm_eval.__version__, max_length=longest_row(checkpoint))

    @property
    def digest(self) -> str:
        """A digest of names and version only: the data is the harness's own."""
        return digest_of({"tasks": self.tasks, "version": self.version})

    @property
    def texts(self) -> tuple[str, ...]:
        return ()

    def score(self, model: Any, tokenizer: Any) -> tuple[Score, ...]:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=self.max_length, batch_size=_batch_size(model)
        )
        results = simple_evaluate(model=wrapped, tasks=list(self.tasks), bootstrap_iters=0, log_samples=False)
        return tuple(_scores(results))


def _batch_size(model: Any) -> int | str:
    """One row at a time on a CPU, where probing for the largest batch takes longer than it saves."""
    return "auto" if model.device.type == "cuda" else 1


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """Every metric of every task and group; keys of the harness are `metric,filter`."""
    for task, metrics in results["results"].items():
        num_examples = int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            yield Score(f"lm-eval {task}", shown, float(value), num_examples, better)
