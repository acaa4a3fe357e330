"""A cluster with a job server, in a network of its own where that is allowed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORT, DASHBOARD_PORT = "26379", "28265"
HEAD = """\
[ -n "$ISOLATED" ] && ip link set lo up
exec ray start --head --num-cpus 2 --node-ip-address 127.0.0.1 --port $PORT --dashboard-host 127.0.0.1 \
  --dashboard-port $DASHBOARD_PORT --object-store-memory 100000000 --temp-dir "$RAY_TMPDIR" \
  --disable-usage-stats --block
"""


class Cluster:
    """A running cluster of one node, and how to run commands beside it."""

    url = f"http://127.0.0.1:{DASHBOARD_PORT}"

    def __init__(self, environment: dict[str, str], enter: list[str]) -> None:
        self.environment, self._enter = environment, enter

    def start(self, *command: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._enter, *command],
            cwd=cwd,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, cwd=cwd, **environment)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def ffsplit(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-m", "ffsplit.cli", *arguments, cwd=cwd)


def isolation() -> list[str]:
    """Ray listens on every interface, so the cluster gets a network of its own where that is allowed."""
    if shutil.which("unshare") and shutil.which("nsenter") and shutil.which("ip"):
        probe = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True)
        if probe.returncode == 0:
            return ["unshare", "-n"]
    return []
