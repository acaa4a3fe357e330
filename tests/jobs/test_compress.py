"""`ray job submit` for real: a cluster is started, a job is submitted, an artifact is there."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ffsplit.artifacts.verify import verify
from tests.small_jobs import SmallJob

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CLUSTER = """\
set -e
[ -n "$ISOLATED" ] && ip link set lo up
ray start --head --num-cpus 2 --node-ip-address 127.0.0.1 --port $PORT --dashboard-host 127.0.0.1 \
  --dashboard-port $DASHBOARD_PORT --object-store-memory 100000000 --temp-dir "$RAY_TMPDIR" \
  --disable-usage-stats > "$LOG" 2>&1
trap 'ray stop --grace-period 20 >> "$LOG" 2>&1' EXIT
ray job submit --address http://127.0.0.1:$DASHBOARD_PORT --working-dir . -- "$@"
"""


def isolation() -> list[str]:
    """Ray listens on every interface, and `ray stop` ends every Ray that it sees: where that is allowed,
    the cluster gets a network and a table of processes of its own."""
    own = ["unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") and shutil.which("ip"):
        probe = subprocess.run([*own, "ip", "link", "set", "lo", "up"], capture_output=True)
        if probe.returncode == 0:
            return own
    return []


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(16))
    folder = Path("/tmp") / f"ffsplit-{secrets.token_hex(4)}"  # Ray's socket paths may not be long
    return os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "ISOLATED": "yes" if isolation() else "",
        "PORT": "26379",
        "DASHBOARD_PORT": "28265",
        "LOG": str(tmp_path / "ray.log"),
    }


def submit(environment: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*isolation(), "bash", "-c", CLUSTER, "bash", "python", *entrypoint],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
    return done


def test_a_submitted_job_publishes(small_job: SmallJob, tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = small_job.arguments(tmp_path / "out", "--workers", "2")
    done = submit(environment, "jobs/compress.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    assert verify(str(tmp_path / "out")).ok


def test_a_relative_out_is_refused_before_it_is_lost(small_job: SmallJob) -> None:
    """A job's working directory is a copy that goes with it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/compress.py"), *small_job.arguments("relative/out")],
        cwd=small_job.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "absolute" in done.stderr
    assert not (small_job.folder / "relative").exists()
