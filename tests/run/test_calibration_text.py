"""What a run says of its text before it starts: which one it reads by default, and how far off a task is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.run.checks import default_text, far_from_evaluation
from ffsplit.run.job import prepare
from tests.small_jobs import SmallJob


@pytest.fixture
def pairs(small_job: SmallJob) -> str:
    """A task whose words are those of the calibration text."""
    rows = small_job.text.read_text().splitlines()
    path = small_job.folder / "pairs.csv"
    path.write_text("\n".join(f"{one},{one},{n}" for n, one in enumerate(rows[:20])))
    return f"sts:{path}"


def test_a_task_of_other_words_is_named(small_job: SmallJob, pairs: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("home\nhome home\nhome home home\n")
    run = prepare(small_job.config(tmp_path / "out", eval=(pairs,)))
    assert far_from_evaluation(run) == []
    run = prepare(small_job.config(tmp_path / "out", eval=(pairs,), calibration=(str(other),)))
    (warning,) = far_from_evaluation(run)
    assert f"of the tokens of {pairs} occur in the calibration text" in warning


def test_without_a_task_nothing_is_compared(small_job: SmallJob, tmp_path: Path) -> None:
    assert far_from_evaluation(prepare(small_job.config(tmp_path / "out"))) == []


def test_a_run_says_that_it_was_given_no_text(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = small_job.text.read_text().splitlines()
    monkeypatch.setattr("ffsplit.run.job.read_texts", lambda spec: texts)
    given = small_job.config(tmp_path / "out")
    assert default_text(prepare(given)) is None
    fields = given.model_dump(exclude={"calibration"}, exclude_unset=True)
    line = default_text(prepare(type(given)(**fields)))
    assert line is not None and "no --calibration: the run reads builtin:text" in line
    flags = [
        "--recipe",
        given.recipe,
        "--runner",
        "serial",
        "--samples",
        "40",
        "--max-length",
        "16",
        "--dry-run",
    ]
    assert main(["compress", given.model, "--out", str(tmp_path / "out"), *flags]) == 0
    assert line in capsys.readouterr().out
