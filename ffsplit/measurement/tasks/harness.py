"""Tasks of the lm-evaluation-harness, for causal language models, through the extra `eval`.

Source: https://github.com/EleutherAI/lm-evaluation-harness. Task data come from the Hugging Face hub. They
are fetched before the run starts, so that an unavailable task costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ffsplit.config import Record
from ffsplit.errors import explained, reason_of
from ffsplit.keys import digest_of
from ffsplit.measurement.tasks.base import Score, longest_row, task_error
from ffsplit.measurement.tasks.perplexity import HEAD
from ffsplit.models.checkpoint import Checkpoint


class HarnessTasks(Record):
    """Tasks of the harness, by name, and the harness's version."""

    kind: Literal["lm-eval"] = "lm-eval"
    tasks: tuple[str, ...]
    version: str
    max_length: int

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


def read_harness(spec: str, *, checkpoint: Checkpoint) -> HarnessTasks:
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
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise task_error(spec, f"lm-eval has no task {name!r}{hint}")
    try:
        manager.load(list(tasks))
    except Exception as error:  # the hub, the network and every data set have errors of their own
        why = f"{type(error).__name__}: {reason_of(error)}"
        raise task_error(
            spec, f"its data cannot be fetched ({why}); check the network and HF_TOKEN"
        ) from error
    return HarnessTasks(tasks=tasks, version=lm_eval.__version__, max_length=longest_row(checkpoint))


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
