"""One cluster with a job server for all tests of jobs."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.ray_head import BIN, DASHBOARD_PORT, HEAD, PORT, ROOT, Cluster, isolation


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    sockets = Path("/tmp") / f"ffsplit-{secrets.token_hex(4)}"  # Ray's socket paths may not be long
    isolated = isolation()
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(sockets),
        "ISOLATED": "yes" if isolated else "",
        "PORT": PORT,
        "DASHBOARD_PORT": DASHBOARD_PORT,
    }
    environment.pop("RAY_ADDRESS", None)
    log = folder / "ray.log"
    with log.open("w") as stream:
        head = subprocess.Popen(
            [*isolated, "bash", "-c", HEAD],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
        )
    enter = ["nsenter", "-t", str(head.pid), "-n"] if isolated else []
    try:
        while "--block" not in log.read_text():
            assert head.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Cluster(environment, enter)
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(sockets, ignore_errors=True)
