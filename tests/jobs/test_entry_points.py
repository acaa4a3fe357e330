"""`ray job submit` for real, with every entry point of jobs/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ffsplit
from ffsplit.store.pull import verify
from tests.jobs.ray_head import ROOT, Cluster
from tests.small_jobs import SmallJob


def ray_job_submit(cluster: Cluster, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    flags = ("--address", cluster.url, "--working-dir", ".")
    return cluster.run("ray", "job", "submit", *flags, "--", "python", *entrypoint)


@pytest.mark.ray
def test_a_run_does_its_work_as_a_job(small_job: SmallJob, tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "out"
    done = ray_job_submit(cluster, "jobs/compress.py", *small_job.arguments(out, "--workers", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"artifact: {out}" in done.stdout and verify(str(out)).ok
    asked = ("ray", "list", "tasks", "--address", cluster.url, "--format", "json", "--limit", "10000")
    shown = {task["name"] for task in json.loads(cluster.run(*asked).stdout)}
    assert {"calibrate", "compress", "measure"} <= shown, "the dashboard shows stages by their names"


@pytest.mark.slow
@pytest.mark.ray
def test_every_other_entry_point_does_its_work_as_a_job(
    small_job: SmallJob, tmp_path: Path, cluster: Cluster
) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    ffsplit.compress(small_job.config(out))
    zoo = tmp_path / "zoo.yaml"
    fields = {"model": str(small_job.model), "recipe": small_job.recipe(), "keep": 0.5}
    fields |= {"calibration": str(small_job.text), "samples": 40, "max_length": 16, "name": "small"}
    zoo.write_text(yaml.safe_dump({"destination": str(tmp_path / "zoo"), "models": [fields]}))
    jobs: dict[str, tuple[tuple[str, ...], str]] = {
        "benchmark": ((str(out), "--against", str(small_job.model)), "tokens/s"),
        "retrieve": ((str(out), str(copy)), str(copy)),
        "zoo": ((str(zoo),), "1 of 1 published (1 now), 0 refused by gates, 0 failed"),
    }
    for name, (arguments, expected) in jobs.items():
        done = ray_job_submit(cluster, f"jobs/{name}.py", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout, name
    assert verify(str(copy)).ok and verify(str(tmp_path / "zoo" / "small")).ok


@pytest.mark.subprocess
@pytest.mark.parametrize("name", ["compress", "retrieve", "zoo"])
def test_a_relative_output_is_refused_before_it_is_lost(name: str, small_job: SmallJob) -> None:
    """A job's working directory is a copy that goes with it."""
    zoo = small_job.folder / "zoo.yaml"
    zoo.write_text("destination: relative/out\nmodels: [{model: m}]\n")
    arguments = {
        "compress": small_job.arguments("relative/out"),
        "retrieve": [str(small_job.folder), "relative/out"],
        "zoo": [str(zoo)],
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / f"jobs/{name}.py"), *arguments[name]],
        cwd=small_job.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "relative/out must be absolute in a job" in done.stderr
    assert not (small_job.folder / "relative").exists()
