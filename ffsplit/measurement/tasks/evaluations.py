"""From the SPECs of `--eval` to scores of the original and the compressed model."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from ffsplit.calibration.model_inputs import TOKENIZED_ROWS
from ffsplit.config import Record
from ffsplit.errors import FFSplitError, explained
from ffsplit.measurement.tasks import AnyTask
from ffsplit.measurement.tasks.base import Score, task_error
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import quiet_transformers
from ffsplit.store.manifest import TaskScore

# How much of the evaluation text is in the calibration set.

_BREAK = re.compile(r"[\r\n]+|(?<=[.!?])\s+")
SHORTEST_SENTENCE = 4
"""Words; shorter pieces of running text ("He said no.") recur everywhere and prove nothing."""


def count_overlap(texts: Iterable[str], calibration: Iterable[str], *, running: bool) -> int:
    """How many distinct texts also occur in the calibration rows, as a row or as a sentence of one.

    Running text is compared sentence by sentence. Case and white space do not matter.
    """
    known: set[str] = set()
    for row in calibration:
        known.add(_normal(row))
        known.update(_sentences(row))
    if running:
        wanted = {
            sentence
            for text in texts
            for sentence in _sentences(text)
            if len(sentence.split()) >= SHORTEST_SENTENCE
        }
    else:
        wanted = {_normal(text) for text in texts}
    return len(wanted & known)


def share_known(
    texts: Sequence[str], calibration: Sequence[str], *, tokenizer: Any, max_length: int
) -> float:
    """The share of the texts' tokens that occur in the calibration rows, as a model reads them: in [0, 1].

    1 if the texts have no token but special ones.
    """
    special = set(tokenizer.all_special_ids)

    def tokens(rows: Sequence[str], **cut: Any) -> Iterator[int]:
        for start in range(0, len(rows), TOKENIZED_ROWS):
            with quiet_transformers():  # it would warn that a text is longer than the model reads
                encoded = tokenizer(list(rows[start : start + TOKENIZED_ROWS]), **cut)["input_ids"]
            yield from (token for ids in encoded for token in ids if token not in special)

    known = set(tokens(calibration, truncation=True, max_length=max_length))
    seen = [token in known for token in tokens(texts)]
    return sum(seen) / len(seen) if seen else 1.0


def _sentences(text: str) -> Iterator[str]:
    return (_normal(piece) for piece in _BREAK.split(text))


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


TASKS: dict[str, type[AnyTask]] = {
    task.model_fields["kind"].default: task for task in get_args(get_args(AnyTask)[0])
}
"""Every task of the union, by the first word of its SPEC."""
FORMS = ", ".join(task.form for task in TASKS.values())


class Evaluation(Record):
    """A task that is read and checked, and how many of its texts are in the calibration set."""

    spec: str
    task: AnyTask
    overlap_with_calibration: int


def read_tasks(specs: Sequence[str], *, checkpoint: Checkpoint, max_length: int | None) -> dict[str, AnyTask]:
    """Read and check every task, by its SPEC. A SPEC given twice counts once.

    `max_length` is the window of perplexity. Raises ConfigError if a task is unknown or does not fit the
    model, or its file is invalid.
    """
    return {spec: _read(spec, checkpoint, max_length) for spec in dict.fromkeys(specs)}


def key_inputs(task: AnyTask) -> dict[str, Any]:
    """What a task's scores depend on besides the model. No path is part of it."""
    return {"kind": task.kind, "digest": task.digest, "max_length": task.max_length}


def evaluations_of(tasks: Mapping[str, AnyTask], *, calibration: Sequence[str]) -> tuple[Evaluation, ...]:
    """The tasks, and how much of each is in the calibration rows."""
    return tuple(
        Evaluation(
            spec=spec,
            task=task,
            overlap_with_calibration=count_overlap(task.texts, calibration, running=task.is_running_text),
        )
        for spec, task in tasks.items()
    )


def score_evaluations(
    evaluations: Sequence[Evaluation], original: Any, compressed: Any, tokenizer: Any
) -> tuple[TaskScore, ...]:
    """Score both models on every task. Raises FFSplitError for a score that is not finite."""
    scores = []
    for evaluation in evaluations:
        before, after = (_finite(evaluation, model, tokenizer) for model in (original, compressed))
        for ours, theirs in zip(after, before, strict=True):
            scores.append(
                TaskScore(
                    name=ours.name,
                    spec=evaluation.spec,
                    metric=ours.metric,
                    higher_is_better=ours.higher_is_better,
                    digest=evaluation.task.digest,
                    original=theirs.value,
                    compressed=ours.value,
                    num_examples=ours.num_examples,
                    overlap_with_calibration=evaluation.overlap_with_calibration,
                )
            )
    return tuple(scores)


def _finite(evaluation: Evaluation, model: Any, tokenizer: Any) -> tuple[Score, ...]:
    with explained(f"{evaluation.spec}: scoring failed", kind=FFSplitError):
        scores = evaluation.task.score(model, tokenizer)
    for score in scores:
        if not math.isfinite(score.value):
            raise FFSplitError(f"{evaluation.spec}: the {score.metric} is {score.value}, not a finite number")
    return scores


def _read(spec: str, checkpoint: Checkpoint, max_length: int | None) -> AnyTask:
    name, colon, _ = spec.partition(":")
    if name in TASKS and colon:
        with explained(f"cannot evaluate {spec}"):
            return TASKS[name].read(spec, checkpoint=checkpoint, max_length=max_length)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0] + ':'!r}? " if near else ""
    raise task_error(spec or "an empty task", f"unknown task {name!r}; {hint}the known forms are {FORMS}")
