"""A store that fails once a run has begun: exit code 1, the first cause told, and a batch tries again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import ffsplit
from ffsplit.cli import main
from ffsplit.errors import ConfigError, RunError
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from ffsplit.zoo.run import run_zoo
from ffsplit.zoo.zoo_file import load_zoo
from tests.s3.fault_proxy import EXPIRED, Fault, FaultProxy
from tests.small_jobs import SmallJob
from tests.store.attempts import publish

Captured = pytest.CaptureFixture[str]
EVER = 1 << 30
FIRST_LAYER = rb"PUT .*/compress/layer-000"


@pytest.fixture
def proxy(s3_uri: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(urlsplit(s3_endpoint).port or 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


def from_on(pattern: bytes, *, first: Fault, then: Fault) -> list[Fault]:
    """`first` strikes the first request of a kind, `then` every later one, of whatever kind."""
    first.applies = lambda line: re.match(pattern, line)
    then.applies = lambda line: first.struck
    return [first, then]


def refused_with(reply: bytes, *, times: int = EVER) -> Fault:
    return Fault("refused", times, reply=reply)


OUTAGE = Fault("refused", 0).reply


@pytest.mark.matrix(replies=((OUTAGE, EXPIRED), (EXPIRED, EXPIRED)))
@pytest.mark.parametrize(
    ("pattern", "replies", "told"),
    [
        (FIRST_LAYER, (OUTAGE, EXPIRED), "503"),
        (FIRST_LAYER, (EXPIRED, OUTAGE), "The provided token has expired"),
        (rb"PUT .*/commit\.json", (EXPIRED, EXPIRED), "The provided token has expired"),
        (rb"PUT .*/manifest\.json", (EXPIRED, OUTAGE), "The provided token has expired"),
    ],
)
def test_the_first_cause_is_told_with_exit_code_1(
    small_job: SmallJob,
    s3_uri: str,
    proxy: FaultProxy,
    capsys: Captured,
    pattern: bytes,
    replies: tuple[bytes, bytes],
    told: str,
) -> None:
    first, then = (refused_with(reply) for reply in replies)
    first.times = 1
    proxy.faults = from_on(pattern, first=first, then=then)
    arguments = ["compress", *small_job.arguments(s3_uri, "--runner", "serial")]
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ffsplit: cannot write ") and told in line
    assert first.struck == 1
    proxy.faults.clear()
    assert main(arguments) == 0  # and goes on from there


def test_a_failure_has_its_cause_in_python_too(small_job: SmallJob, s3_uri: str, proxy: FaultProxy) -> None:
    proxy.faults = from_on(FIRST_LAYER, first=refused_with(EXPIRED, times=1), then=refused_with(OUTAGE))
    with pytest.raises(RunError, match="ExpiredToken") as caught:
        ffsplit.compress(small_job.config(s3_uri))
    assert isinstance(caught.value.__cause__, ConfigError)


def test_before_the_first_write_it_is_a_mistake_and_an_outage_is_none(
    small_job: SmallJob, s3_uri: str, proxy: FaultProxy, capsys: Captured
) -> None:
    arguments = ["compress", *small_job.arguments(s3_uri, "--runner", "serial")]
    for reply, code in ((EXPIRED, 2), (OUTAGE, 1)):
        proxy.faults = [refused_with(reply)]
        assert main(arguments) == code
        assert capsys.readouterr().err.count("\n") == 1
    proxy.faults.clear()
    with pytest.raises(ConfigError, match="holds no"):
        verify(s3_uri)


def test_a_run_stands_whose_hint_cannot_be_looked_after(
    small_job: SmallJob, s3_uri: str, proxy: FaultProxy, capsys: Captured
) -> None:
    arguments = ["compress", *small_job.arguments(s3_uri, "--runner", "serial")]
    assert main(arguments) == 0
    listing = refused_with(OUTAGE)
    listing.applies = lambda line: re.match(rb"GET .*list-type=2", line)
    proxy.faults = [listing]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "warning: latest.json may be out of date until it is next read: " in capsys.readouterr().err
    assert listing.struck


@pytest.mark.slow
def test_a_batch_tries_such_a_run_again(small_job: SmallJob, s3_uri: str, proxy: FaultProxy) -> None:
    """Whichever way the store failed."""
    struck = refused_with(EXPIRED, times=1)
    struck.applies = lambda line: re.match(FIRST_LAYER, line)
    proxy.faults = [struck]
    model = {"model": str(small_job.model), "name": "one", "recipe": small_job.recipe(), "keep": 0.5}
    model |= {"calibration": str(small_job.text), "samples": 40, "max_length": 16}
    file = small_job.folder / "zoo.yaml"
    file.write_text(yaml.safe_dump({"destination": s3_uri, "backoff_s": 0, "retries": 1, "models": [model]}))
    (one,) = run_zoo(load_zoo(str(file)), runner="serial", say=lambda line: None).models
    assert (one.state, one.num_attempts, struck.struck) == ("published", 2, 1)


def test_a_batch_that_cannot_be_recorded_is_a_failure(
    small_job: SmallJob, s3_uri: str, proxy: FaultProxy, capsys: Captured, tmp_path: Path
) -> None:
    record = refused_with(EXPIRED)
    record.applies = lambda line: re.match(rb"PUT .*/batches/", line)
    proxy.faults = [record]
    file = tmp_path / "zoo.yaml"
    file.write_text(yaml.safe_dump({"destination": s3_uri, "models": [{"model": "/none", "name": "one"}]}))
    assert main(["zoo", str(file), "--runner", "serial"]) == 1
    assert "The provided token has expired" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "pattern"),
    [("pull", rb"GET .*/model\.safetensors"), ("gc", rb"(DELETE|POST) .*(commit\.json|delete)")],
)
def test_other_commands_that_write_keep_to_it_too(
    s3_uri: str, proxy: FaultProxy, capsys: Captured, tmp_path: Path, command: str, pattern: bytes
) -> None:
    publish(open_store(s3_uri), tmp_path / "attempt", kind="statistics" if command == "gc" else "model")
    proxy.faults = from_on(pattern, first=refused_with(EXPIRED, times=1), then=refused_with(OUTAGE))
    flags = {"pull": [str(tmp_path / "copy")], "gc": ["--keep-last", "0", "--min-age", "0s", "--delete"]}
    assert main([command, s3_uri, *flags[command]]) == 1
    assert "The provided token has expired" in capsys.readouterr().err.splitlines()[-1]
