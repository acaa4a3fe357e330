"""What a run tells while it works: structured lines, counters, and nothing of what is secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from ffsplit import logs
from ffsplit.distributed import observing
from ffsplit.distributed.observing import Observed
from ffsplit.errors import ConfigError
from ffsplit.store.entries import FileEntry
from ffsplit.store.scratch import Result
from tests.faults.isolation import environment_of_ray, isolated

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.ray
@pytest.mark.s3
def test_a_run_tells_what_it_does_and_no_secret(tmp_path: Path) -> None:
    secrets = [uuid4().hex for _ in range(3)]
    environment = {
        "FFSPLIT_LOG": "json",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": secrets[0],
        "AWS_SESSION_TOKEN": secrets[1],
        "HF_TOKEN": secrets[2],
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_metrics_report_interval_ms": "1000",
    }
    with environment_of_ray(tmp_path, **environment) as whole:
        done = subprocess.run(
            isolated([sys.executable, "-m", "tests.distributed.observed_run", str(tmp_path)]),
            cwd=ROOT,
            env=whole,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["leaks"] == [] and not found["jobs_leak"]
    assert found["published"] >= 2
    assert not any(secret in done.stderr for secret in secrets)
    assert found["runs"] == [found["run"]]
    assert found["finished"] == {"calibrate": 5, "compress": 3}
    assert {"shard-00000", "shard-00004", "layer-002"} <= set(found["items"])
    assert found["counters"]["ffsplit_shards_done calibrate"] == 5
    assert found["counters"]["ffsplit_shards_done compress"] == 3
    assert found["counters"]["ffsplit_tokens calibrate"] == found["tokens"]
    assert found["counters"]["ffsplit_bytes compress"] > 0
    own = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"time"')]
    assert {"note", "progress", "stage done", "publishing"} <= {line["event"] for line in own}


def test_lines_have_the_fields_of_the_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs._logger, "handlers", [])
    monkeypatch.setattr(logs._logger, "propagate", True)
    logs.set_up("json")
    logs.set_up("json")
    with logs.fields(run="key", stage="calibrate"):
        logs.log("taken", item="shard-00001")
    logs.log("bare")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["event"], first["run"], first["stage"], first["item"]) == (
        "taken",
        "key",
        "calibrate",
        "shard-00001",
    )
    assert "run" not in second and {"time", "level", "event", "host", "pid"} <= set(second)


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(ConfigError, match="FFSPLIT_LOG must be text or json"):
        logs.asked_for()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is added to which counter of the stage `compress`."""
    found: list[tuple[str, int]] = []

    def count(name: str, value: int, *, stage: str) -> None:
        assert stage == "compress"
        found.append((name, value))

    monkeypatch.setattr(observing, "count", count)
    return found


@pytest.mark.parametrize("reused", [True, False])
def test_what_was_computed_before_is_not_counted_again(counted: list[tuple[str, int]], reused: bool) -> None:
    files = (FileEntry(path="a", size_bytes=7, sha256="0" * 64),)
    result = Result(name="layer-000", files=files, facts={"num_tokens": 3}, reused=reused)
    assert Observed("compress", "text", {})(lambda _: result, None) == result
    expected = [("ffsplit_shards_done", 1), ("ffsplit_tokens", 3), ("ffsplit_bytes", 7)]
    assert counted == ([] if reused else expected)


def test_a_lost_worker_is_counted_and_told(
    counted: list[tuple[str, int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs._logger, "handlers", [])
    monkeypatch.setattr(logs._logger, "propagate", True)
    logs.set_up("json")
    Observed("compress", "json", {"run": "key"}).lost("its host left")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["reason"]) == ("lost", "warning", "its host left")
    assert (line["run"], line["stage"]) == ("key", "compress")
    assert counted == [("ffsplit_failures", 1)]
