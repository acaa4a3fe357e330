"""What is in use: batches move the alias to what is not worse, and leave alone what people decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli.batch_lines import print_batch
from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError
from ffsplit.measurement.regressions import parse_regression
from ffsplit.store.aliases import aliased_runs, history, promote, remove_alias
from ffsplit.store.commits import Commit, read_commit
from ffsplit.store.entries import file_entries
from ffsplit.store.store import open_store
from ffsplit.zoo import promotion
from ffsplit.zoo.batch import Promotion
from ffsplit.zoo.promotion import promote_result
from ffsplit.zoo.run import run_zoo
from ffsplit.zoo.zoo_file import ZooModel, parse_zoo
from tests.measurement.test_regressions import measured
from tests.small_jobs import SmallJob
from tests.store.attempts import ATTEMPT, FILES, make_manifest, publish_directory
from tests.zoo.test_page import batch, model
from tests.zoo.test_run import zoo

GOOD, BAD, NEXT = ("a" * 16, "b" * 16, "c" * 16)


def publish(folder: Path, run_key: str, **figures: Any) -> Commit:
    """A published run with these measurements."""
    directory = folder / run_key
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(FILES["model.safetensors"])
    manifest = make_manifest(run_key=run_key, attempt=ATTEMPT, files=file_entries(directory))
    manifest = manifest.model_copy(update={"measurements": measured(**figures)})
    (directory / "manifest.json").write_text(manifest.to_json())
    return publish_directory(open_store(str(folder / "store")), directory, run_key=run_key)


def promoted(folder: Path, run_key: str, *gates: str) -> Promotion:
    job = JobConfig(model="m", out=str(folder / "store"))
    asked = ZooModel(name="tiny", job=job, regressions=tuple(map(parse_regression, gates)))
    return promote_result(asked, run_key, alias="production", by="me, batch 1")


def test_a_better_result_comes_into_use_and_a_worse_one_does_not(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    publish(tmp_path, GOOD, score=86.0)
    publish(tmp_path, BAD, score=85.0, file_bytes=900)
    strict, lenient = "sts drop <= 0.2 of current", "sts drop <= 2 of current"
    first = promoted(tmp_path, GOOD, strict)
    assert (first.outcome, first.current, first.differences) == ("promoted", None, ())
    assert promoted(tmp_path, GOOD, strict).outcome == "in use"

    refused = promoted(tmp_path, BAD, strict)
    assert (refused.outcome, refused.current) == ("refused", GOOD) and aliased_runs(store) == {GOOD}
    assert [(gate.gate, gate.figure, gate.met) for gate in refused.gates] == [(strict, 1.0, False)]
    shown = {each.what: (each.before, each.after) for each in refused.differences}
    assert shown["size"] == (1000, 900) and shown["sts dev.csv, spearman"] == (86.0, 85.0)
    assert shown["speed-up at 8x128"] == (4.0, 4.0) and shown["pooled cosine"] == (0.98, 0.98)

    assert promoted(tmp_path, BAD, lenient).outcome == "promoted" and aliased_runs(store) == {BAD}
    assert [change.changed_by for change in history(store, "production")] == ["me, batch 1"] * 2
    held = promoted(tmp_path, GOOD, strict)  # in use before: someone may have had a reason
    assert (held.outcome, held.current) == ("held", BAD) and aliased_runs(store) == {BAD}
    remove_alias(store, "production")
    assert promoted(tmp_path, BAD, lenient).outcome == "held"
    publish(tmp_path, NEXT)
    assert promoted(tmp_path, NEXT, strict).outcome == "promoted"


def test_an_alias_that_cannot_be_moved_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    promote(store, publish(tmp_path, GOOD), alias="production")
    publish(tmp_path, BAD)
    store.delete(f"{GOOD}/commit.json")
    failed = promoted(tmp_path, BAD)
    assert failed.outcome == "failed" and failed.error is not None and "holds no artifact" in failed.error
    assert aliased_runs(store) == {GOOD}
    assert "was removed meanwhile" in (promoted(tmp_path, "d" * 16).error or "")


def test_an_unforeseen_error_stays_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(open_store(str(tmp_path / "store")), publish(tmp_path, GOOD), alias="production")
    publish(tmp_path, BAD)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(promotion, "judge_regressions", fail)
    found = promoted(tmp_path, BAD)
    assert (found.outcome, found.error) == ("failed", "the comparison failed: division by zero")


def test_an_alias_that_moves_meanwhile_is_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run that it names by then, which here is better than the new one."""
    store = open_store(str(tmp_path / "store"))
    promote(store, publish(tmp_path, GOOD, score=84.0), alias="production")
    better = publish(tmp_path, NEXT, score=87.0)
    publish(tmp_path, BAD, score=85.0)
    judge = promotion.judge_regressions

    def moved_as_it_compares(*arguments: Any) -> Any:
        promote(store, better, alias="production", by="anna@build")
        return judge(*arguments)

    monkeypatch.setattr(promotion, "judge_regressions", moved_as_it_compares)
    found = promoted(tmp_path, BAD, "sts drop <= 0.2 of current")
    assert (found.outcome, found.current) == ("refused", NEXT)
    assert [change.run_key for change in history(store, "production")] == [GOOD, NEXT]


def test_the_batch_says_what_became_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    publish(tmp_path, GOOD, score=86.0)
    publish(tmp_path, BAD, score=85.0)
    promoted(tmp_path, GOOD)
    refused = promoted(tmp_path, BAD, "sts drop <= 0.2 of current")
    worse = batch(1, model("tiny", "published").model_copy(update={"promotion": refused}))
    print_batch(worse, destination="out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        f"  production stays at {GOOD}: a regression gate failed",
        "  gate sts drop <= 0.2 of current: 1, NOT met",
    ]
    assert worse.exit_code == 3
    for outcome, code in (("promoted", 0), ("in use", 0), ("held", 0), ("failed", 1)):
        ended = refused.model_copy(update={"outcome": outcome})
        each = batch(1, model("tiny", "published").model_copy(update={"promotion": ended}))
        assert each.exit_code == code


def test_a_batch_promotes(small_job: SmallJob) -> None:
    asked = zoo(small_job, {"name": "tiny"}, promote="production", prices={"CPU": 0.36})
    done = run_zoo(asked, runner="serial", say=lambda line: None)
    (tiny,) = done.models
    assert tiny.promotion is not None and tiny.promotion.outcome == "promoted" and tiny.result is not None
    store = open_store(f"{asked.destination}/tiny")
    (change,) = history(store, "production")
    assert change.run_key == tiny.result.run_key and change.changed_by.endswith(f", batch {done.id}")
    assert read_commit(store, tiny.result.run_key) is not None
    assert {"calibrate", "compress", "measure"} <= {each.name for each in tiny.result.stages}
    assert tiny.cost is not None and tiny.cost.gpu_s == 0
    assert tiny.cost.cpu_s == pytest.approx(sum(each.wall_s for each in tiny.result.stages), abs=0.01)
    assert tiny.cost.price == pytest.approx(tiny.cost.cpu_s * 0.36 / 3600, abs=1e-6)
    assert tiny.result.inputs.keys() > {"model", "recipe", "calibration data", "budget", "gates"}


FILE: dict[str, Any] = {"destination": "/zoo", "models": [{"model": "m"}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promote": "Production"}, "promote: 'Production' is not a valid alias"),
        ({"promote": "latest"}, "promote: 'latest' always names the newest model"),
        (
            {"defaults": {"gate": "sts drop <= 0.2 of current"}},
            r"models\[0\] \(m\): gate 'sts drop <= 0.2 of current' needs `promote: production`",
        ),
        (
            {"promote": "production", "defaults": {"gate": ["sts <= 1 of current"]}},
            r"models\[0\] \(m\): gate 'sts <= 1 of current': the forms are",
        ),
        ({"prices": {"H100": -1}}, "prices.H100"),
        ({"prices": {"H100": "cheap"}}, "prices.H100"),
    ],
)
def test_mistakes_in_the_file(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^zoo.yaml: {message}"):
        parse_zoo(json.dumps(FILE | fields), where="zoo.yaml", name="zoo")


def test_regression_gates_are_no_part_of_the_run() -> None:
    text = json.dumps(FILE | {"promote": "production", "defaults": {"gate": "sts drop <= 0.2 of current"}})
    (asked,) = parse_zoo(text, where="zoo.yaml", name="zoo").models
    assert asked.job.gate == () and [str(gate) for gate in asked.regressions] == [
        "sts drop <= 0.2 of current"
    ]
