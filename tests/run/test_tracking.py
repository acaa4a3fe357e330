"""Runs in MLflow: a real tracking server on loopback, with SQLite."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from ffsplit.errors import ConfigError
from ffsplit.run.driver import run_to_end
from tests.small_jobs import SmallJob

mlflow = pytest.importorskip("mlflow")
SERVER = os.environ.get("FFSPLIT_TEST_MLFLOW") or shutil.which("mlflow")
"""The program whose server is started. It may be in an environment of its own."""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    if SERVER is None:
        pytest.skip("no `mlflow server` is installed")
    port, folder = free_port(), tmp_path / "mlflow"
    folder.mkdir()
    command = [SERVER, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            until = time.monotonic() + 120
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.mark.subprocess
def test_a_run_is_logged_once(server: str, small_job: SmallJob, tmp_path: Path) -> None:
    config = small_job.config(tmp_path / "out", mlflow=server)
    manifest = run_to_end(config).manifest
    run_to_end(config)  # committed already, and logged
    client = mlflow.MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("ffsplit").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.data.tags["ffsplit.run_key"] == manifest.run_key
    assert run.data.tags["ffsplit.uri"] == manifest.uri and run.data.tags["ffsplit.state"] == "published"
    assert run.data.params["recipe"] == "small" and run.data.params["budget"] == "--keep 0.5"
    measured = manifest.measurements
    assert measured is not None
    metrics = run.data.metrics
    assert metrics["fidelity/pooled_cosine"] == measured.fidelity["pooled_cosine"]
    assert metrics["weight_bytes/compressed"] == measured.compressed_size.file_bytes
    assert metrics["speedup/1x8"] == pytest.approx(measured.latency[0].speedup)
    assert "seconds/calibrate" in metrics
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"manifest.json", "report.html"}
    fetched = Path(client.download_artifacts(run.info.run_id, "manifest.json", str(tmp_path)))
    assert json.loads(fetched.read_text())["run_key"] == manifest.run_key

    refused = run_to_end(config.model_copy(update={"gate": ("fidelity >= 2",)}))
    assert refused.state == "refused"
    states = {each.data.tags["ffsplit.state"]: each.info.status for each in client.search_runs([experiment])}
    assert states == {"published": "FINISHED", "refused": "FAILED"}


def test_a_server_that_does_not_answer_is_told_before_any_work(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"--mlflow http://127.0.0.1:\d+: .*check the URI"):
        run_to_end(small_job.config(tmp_path / "out", mlflow=f"http://127.0.0.1:{free_port()}"))
    assert not (tmp_path / "out").exists()
