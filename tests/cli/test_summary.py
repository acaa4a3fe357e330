"""What commands print of a result, from manifests that are made up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ffsplit.api import calibrate
from ffsplit.cli import main
from ffsplit.cli.tables import print_manifest
from ffsplit.store.manifest import Manifest
from tests.report.conftest import manifest_fields, measurement_fields
from tests.small_jobs import LOW_RANK, SmallJob

Captured = pytest.CaptureFixture[str]


def printed(capsys: Captured, **measured: Any) -> str:
    fields = manifest_fields(6) | {"measurements": measurement_fields() | measured}
    print_manifest(Manifest.model_validate(fields), out="/out/")
    return capsys.readouterr().out


def task(name: str, overlap: int) -> dict[str, Any]:
    named = {"name": name, "spec": f"sts:{name}", "metric": "spearman", "digest": "0" * 64}
    scores = {"original": 0.8, "compressed": 0.7, "higher_is_better": True, "num_examples": 100}
    return named | scores | {"overlap_with_calibration": overlap}


def test_a_quiet_measurement_has_no_warning_and_tells_peak_memory(capsys: Captured) -> None:
    shown = printed(capsys, tasks=(task("clean.csv", 0),))
    assert "warning" not in shown and "not measured" not in shown and "sts:clean.csv" not in shown
    assert re.search(r"peak memory .*412.*371.*-10\.0%", shown)
    assert "artifact: /out/9f2c51e07ab3d846/20250314T101500-7c2e\n" in shown


def test_what_flatters_or_was_left_out_is_told(capsys: Captured) -> None:
    skipped = ("latency: the models went through one block at a time",)
    tasks = (task("clean.csv", 0), task("seen.csv", 1234))
    shown = printed(capsys, tasks=tasks, skipped=skipped, original_peak_memory_bytes=None)
    assert f"not measured: {skipped[0]}\n" in shown and "peak memory" not in shown
    warnings = [line for line in shown.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: 1,234 evaluation sentences of sts:seen.csv are in the calibration text too"]


def test_statistics_have_nothing_before_and_after(capsys: Captured) -> None:
    fields = manifest_fields(6) | {"kind": "statistics", "measurements": None, "keep": None}
    print_manifest(Manifest.model_validate(fields), out="/out")
    where = "/out/9f2c51e07ab3d846/20250314T101500-7c2e"
    assert capsys.readouterr().out == f"artifact: {where}\nreport:   {where}/report.html\n"


def test_a_forecast_tells_heavy_hitters_where_they_are_not_all(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    calibrate(small_job.config(tmp_path / "out"))
    capsys.readouterr()
    command = ["plan", str(tmp_path / "out"), "--keep", "0.5", "--recipe"]
    assert main([*command, small_job.recipe(heavy_share=0.5, step=LOW_RANK)]) == 0
    assert len(re.findall(r"\b\d+ heavy\b", capsys.readouterr().out)) == 3
    assert main([*command, small_job.recipe()]) == 0
    assert not re.search(r"\b\d+ heavy\b", capsys.readouterr().out)
