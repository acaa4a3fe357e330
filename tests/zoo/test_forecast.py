"""What a batch would do: which models would run, why, and at what cost. Nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli import main
from ffsplit.run.driver import run_to_end
from ffsplit.run.job import prepare
from ffsplit.zoo.forecast import ModelForecast, forecast
from tests.small_jobs import SmallJob
from tests.zoo.test_run import zoo, zoo_file


def would(small_job: SmallJob, **fields: Any) -> ModelForecast:
    asked = zoo(small_job, {"name": "tiny", **fields}, prices={"CPU": 36.0})
    jobs = [each.model_copy(update={"job": serial(each.job)}) for each in asked.models]
    (found,) = forecast(asked.model_copy(update={"models": tuple(jobs)}), {}).models
    return found


def serial(job: Any) -> Any:
    return job.model_copy(update={"runner": "serial"})


def test_why_a_model_would_run(small_job: SmallJob, tmp_path: Path) -> None:
    never = would(small_job)
    assert (never.action, never.reasons) == ("run", ("never run",))
    assert never.seconds is not None and never.cost is not None and never.cost.price is not None
    assert never.cost.price > 0 and never.cost.price == pytest.approx(never.cost.cpu_s / 100, abs=1e-5)
    assert not (small_job.folder / "zoo").exists()

    run_to_end(serial(zoo(small_job, {"name": "tiny"}).models[0].job))
    skipped = would(small_job)
    assert (skipped.action, skipped.reasons) == ("skip", (f"run {never.run_key} is committed",))
    assert skipped.cost is None

    other = tmp_path / "other.txt"
    other.write_text(small_job.text.read_text().upper())
    assert would(small_job, calibration=str(other)).reasons == ("new calibration data",)
    assert would(small_job, keep=0.4).reasons == ("new budget",)
    assert would(small_job, gate=["fidelity >= 0.1"]).reasons == ("new gates",)
    assert "new recipe" in would(small_job, recipe=small_job.recipe(heavy_share=0.5)).reasons
    missing = would(small_job, model="/none/model")
    assert missing.action == "cannot run" and "/none/model does not exist" in missing.reasons[0]


def test_inputs_name_what_a_key_depends_on(small_job: SmallJob, tmp_path: Path) -> None:
    """Two runs have one key if and only if their inputs are equal."""
    first = prepare(small_job.config(tmp_path)).keys
    assert prepare(small_job.config(tmp_path / "elsewhere")).keys.inputs == first.inputs
    for fields in ({"seed": 1}, {"keep": 0.4}, {"samples": 30}, {"gate": ("fidelity >= 0.1",)}):
        other = prepare(small_job.config(tmp_path, **fields)).keys
        assert other.run != first.run and other.inputs != first.inputs


def test_the_command(small_job: SmallJob, capsys: pytest.CaptureFixture[str]) -> None:
    file = zoo_file(small_job, {"name": "tiny"}, {"name": "bad", "model": "/none"}, prices={"CPU": 1})
    assert main(["zoo", str(file), "--dry-run", "--runner", "serial"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: run: never run (about ") and ", cost about " in lines[0]
    assert lines[1].startswith("bad: cannot run: model directory /none does not exist")
    assert lines[2].startswith("would run 1 of 2 (about ") and lines[3] == "dry run, nothing was written"
    assert not (small_job.folder / "zoo").exists()
    assert main(["zoo", str(file), "--dry-run", "--runner", "serial", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [model["action"] for model in found["models"]] == ["run", "cannot run"]
