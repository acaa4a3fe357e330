"""SPECs become tasks, and tasks scores of two models, each scored once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.measurement.tasks import Classification
from ffsplit.measurement.tasks.base import Score
from ffsplit.measurement.tasks.evaluations import (
    TASKS,
    Evaluation,
    evaluations_of,
    key_inputs,
    read_tasks,
    score_evaluations,
    share_known,
)
from ffsplit.models.checkpoint import Checkpoint
from tests.measurement.tasks.conftest import LoadedFactory
from tests.tiny_models import make_model


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.csv"
    path.write_text("the people,her people,3\nat home,many years,1\none two,first time,2\n")
    return path


def read(
    spec: str, checkpoint: Checkpoint, *, calibration: tuple[str, ...] = (), max_length: int | None = None
) -> tuple[Evaluation, ...]:
    tasks = read_tasks((spec,), checkpoint=checkpoint, max_length=max_length)
    return evaluations_of(tasks, calibration=calibration)


def test_the_key_names_the_data_and_no_path(loaded: LoadedFactory, pairs: Path, tmp_path: Path) -> None:
    checkpoint = loaded("bert").checkpoint
    (first,) = read(f"sts:{pairs}", checkpoint)
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text(pairs.read_text())
    (second,) = read(f"sts:{elsewhere}#0,1,2", checkpoint)
    assert key_inputs(first.task) == key_inputs(second.task)
    assert str(tmp_path) not in str(key_inputs(first.task))
    elsewhere.write_text(pairs.read_text().replace("3", "4"))
    (third,) = read(f"sts:{elsewhere}", checkpoint)
    assert key_inputs(third.task) != key_inputs(first.task)


def test_a_window_is_part_of_the_key(loaded: LoadedFactory, tmp_path: Path) -> None:
    checkpoint = loaded("llama", head="ForCausalLM").checkpoint
    (tmp_path / "a.txt").write_text("the people of this time " * 20)
    tasks = [read(f"perplexity:{tmp_path}/a.txt", checkpoint, max_length=n)[0].task for n in (16, 32)]
    assert key_inputs(tasks[0]) != key_inputs(tasks[1])


def test_a_spec_given_twice_counts_once(loaded: LoadedFactory, pairs: Path) -> None:
    spec = f"sts:{pairs}"
    checkpoint = loaded("bert").checkpoint
    assert len(read_tasks((spec, f"{spec}#0,1,2", spec), checkpoint=checkpoint, max_length=8)) == 2


def test_sentences_seen_in_calibration_are_counted(loaded: LoadedFactory, pairs: Path) -> None:
    (found,) = read(f"sts:{pairs}", loaded("bert").checkpoint, calibration=("At home", "many years", "other"))
    assert found.overlap_with_calibration == 2


def test_the_share_of_tokens_that_calibration_has(loaded: LoadedFactory) -> None:
    tokenizer = loaded("bert").tokenizer

    def share(*calibration: str, max_length: int = 16) -> float:
        texts = ("the people the", "many years")
        return share_known(texts, calibration, tokenizer=tokenizer, max_length=max_length)

    assert share("the people", "years many") == 1
    assert share("the") == 2 / 5  # each occurrence counts
    assert share("home", "") == 0  # special tokens do not
    assert share("home the people", max_length=3) == 0, "what a row is cut to counts"
    assert share_known((), ("home",), tokenizer=tokenizer, max_length=8) == 1


def test_scores_of_both_models(loaded: LoadedFactory, pairs: Path) -> None:
    checkpoint, model, tokenizer = loaded("bert")
    other = make_model("bert", seed=1)
    evaluations = read(f"sts:{pairs}", checkpoint, calibration=("at home",))
    (score,) = score_evaluations(evaluations, model, other, tokenizer)
    task = evaluations[0].task
    assert score.original == task.score(model, tokenizer)[0].value
    assert score.compressed == task.score(other, tokenizer)[0].value
    assert (score.name, score.spec, score.metric) == ("sts pairs.csv", f"sts:{pairs}", "spearman")
    assert (score.digest, score.num_examples, score.overlap_with_calibration) == (task.digest, 3, 1)
    assert Evaluation.model_validate_json(evaluations[0].model_dump_json()) == evaluations[0]


def test_each_model_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classification(name="c", texts=("a",), labels=(0,), num_labels=2, max_length=8)
    scored = []

    def score(self: Classification, model: str, tokenizer: Any) -> tuple[Score, ...]:
        scored.append(model)
        return tuple(Score("c", metric, len(model), 1) for metric in ("accuracy", "f1"))

    monkeypatch.setattr(Classification, "score", score)
    evaluation = Evaluation(spec="classification:c.tsv", task=task, overlap_with_calibration=0)
    scores = score_evaluations((evaluation,), "original", "compressed", None)
    assert scored == ["original", "compressed"]
    found = [(each.metric, each.original, each.compressed) for each in scores]
    assert found == [("accuracy", 8, 10), ("f1", 8, 10)]


def test_a_score_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classification(name="c", texts=("a",), labels=(0,), num_labels=2, max_length=8)
    answer = (Score("c", "accuracy", math.nan, 1),)
    monkeypatch.setattr(Classification, "score", lambda *_: answer)
    evaluation = Evaluation(spec="classification:c.tsv", task=task, overlap_with_calibration=0)
    with pytest.raises(FFSplitError, match=r"classification:c\.tsv: the accuracy is nan"):
        score_evaluations((evaluation,), None, None, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stss:a.csv", "unknown task 'stss'; did you mean 'sts:'"),
        ("clasification:a.csv", "did you mean 'classification:'"),
        ("glue:cola", "unknown task 'glue'; the known forms are sts:file.csv"),
        ("sts", "did you mean 'sts:'"),
        ("a.csv", "unknown task 'a.csv'"),
        ("", "cannot evaluate an empty task"),
    ],
)
def test_an_unknown_task_gets_a_suggestion(loaded: LoadedFactory, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(spec, loaded("bert").checkpoint)


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_is_in_the_help_and_in_the_guide(kind: str) -> None:
    form = TASKS[kind].form
    assert form.startswith(f"{kind}:")
    assert form in (JobConfig.model_fields["eval"].description or "")
    guide = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text("utf-8")
    assert f"| `{kind}:" in guide
