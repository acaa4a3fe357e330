"""`ray job stop` ends everything that a job began, and leaves nothing that looks like an artifact."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.jobs.ray_head import Cluster
from tests.small_jobs import HEALED_SHARDS, SmallJob

WITHIN_S = 10.0
LAST_BEFORE = {"calibrate": '"event": "note"', "heal": '"stage": "compress", "num_items"'}
"""What a job's log says before a stage is under way."""


def processes(cluster: Cluster) -> dict[int, str]:
    """Everything that runs below a cluster: daemons, workers, jobs and what these have started."""
    found, folder = {}, cluster.environment["RAY_TMPDIR"]
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == folder and process.status() != "zombie":
                found[process.pid] = " ".join(process.cmdline())
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], object], what: Callable[[], object], *, within_s: float) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within_s, what()
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["calibrate", "heal"])
def test_a_stopped_job_leaves_nothing(
    stage: str, small_job: SmallJob, tmp_path: Path, cluster: Cluster
) -> None:
    """Within ten seconds, whatever its workers are in the middle of."""
    out, name = tmp_path / "out", f"stop-{uuid4().hex[:8]}"
    arguments = small_job.arguments(out, "--workers", "2", "--log-format", "json")
    arguments[arguments.index("--recipe") + 1] = small_job.recipe(**HEALED_SHARDS)
    before = processes(cluster)

    address = ("--address", cluster.url)
    submission = ("--submission-id", name, "--working-dir", ".", "--no-wait", "--", "python")
    submitted = cluster.run("ray", "job", "submit", *address, *submission, "jobs/compress.py", *arguments)
    assert submitted.returncode == 0, submitted.stderr
    log = Path(cluster.environment["RAY_TMPDIR"]) / f"session_latest/logs/job-driver-{name}.log"

    def said() -> str:
        return log.read_text() if log.exists() else ""

    wait_until(lambda: LAST_BEFORE[stage] in said(), said, within_s=180)
    time.sleep(0.2)
    stopped = cluster.run("ray", "job", "stop", *address, "--no-wait", name)
    assert stopped.returncode == 0, stopped.stderr

    def strays() -> list[str]:
        return [f"{pid} {line}" for pid, line in processes(cluster).items() if pid not in before]

    wait_until(lambda: not strays(), strays, within_s=WITHIN_S)
    assert not list(out.glob("*/commit.json")) and not list(out.glob("*/*/manifest.json")), said()
    assert '"event": "publishing"' not in said()
