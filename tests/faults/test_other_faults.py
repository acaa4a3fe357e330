"""A full disk, a store that is away, no memory, two drivers at once, and being stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

import ffsplit
from ffsplit.errors import FFSplitError
from ffsplit.store.pull import verify
from tests.faults.isolation import EVERYTHING, NETWORK, can, environment_of_ray, isolated
from tests.s3.fault_proxy import Fault, FaultProxy
from tests.small_jobs import HEALED_SHARDS, SmallJob, committed_digests

ROOT = Path(__file__).parents[2]
long = pytest.mark.skipif("FFSPLIT_TEST_KILLS" not in os.environ, reason="part of make test-faults")
AWAY_S = 60.0


def command(job: SmallJob, out: Path | str, *more: str) -> list[str]:
    return [sys.executable, "-m", "ffsplit.cli", "compress", *job.arguments(out, *more)]


def run(
    arguments: list[str], environment: dict[str, str], *, flags: Sequence[str] = NETWORK
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        isolated(arguments, flags=flags),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.skipif(not can(*EVERYTHING), reason="needs mounts of its own")
@pytest.mark.parametrize("what", ["--out", "TMPDIR"])
def test_a_disk_that_fills_up_is_one_line_and_commits_nothing(
    what: str, small_job: SmallJob, tmp_path: Path
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    target, temporary = (disk / "out", tmp_path) if what == "--out" else (out, disk)
    compress = " ".join(command(small_job, target, "--runner", "serial"))
    script = f"""
        mount -t tmpfs -o size=4m none {disk}
        (until [ -d {target}/.scratch ]; do sleep 0.05; done; head -c 9000000 /dev/zero > {disk}/filler) &
        TMPDIR={temporary} {compress}
        code=$?
        find {tmp_path} -name commit.json
        exit $code
    """
    done = run(["bash", "-c", script], dict(os.environ), flags=EVERYTHING)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ffsplit: ")
    assert "no space left" in done.stderr.splitlines()[-1]
    assert "commit.json" not in done.stdout


@pytest.mark.subprocess
@long
@pytest.mark.ray
def test_a_worker_without_memory_is_one_line(small_job: SmallJob, tmp_path: Path) -> None:
    """Ray's own monitor, set so low that it finds every worker too large."""
    strict = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"}
    with environment_of_ray(tmp_path, **strict) as environment:
        done = run(command(small_job, tmp_path / "out", "--workers", "1"), environment)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ffsplit: ") and "memory" in last
    assert not list((tmp_path / "out").glob("*/commit.json"))


@pytest.fixture
def proxied_store(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    yield proxy
    proxy.close()


@long
@pytest.mark.s3
def test_a_store_that_is_away_for_a_minute(
    small_job: SmallJob, s3_uri: str, proxied_store: FaultProxy, tmp_path: Path
) -> None:
    ffsplit.compress(small_job.config(tmp_path / "undisturbed"))
    again_at = time.monotonic() + AWAY_S + 5
    away = Fault("refused", times=10**9, applies=lambda _: again_at - AWAY_S < time.monotonic() < again_at)
    proxied_store.faults.append(away)
    recipe = small_job.recipe(**HEALED_SHARDS)
    try:
        manifest = ffsplit.compress(small_job.config(s3_uri, recipe=recipe, samples=40))
    except FFSplitError as error:
        assert "\n" not in str(error) and s3_uri.split("/")[2] in str(error)
        time.sleep(max(0.0, again_at - time.monotonic()))
        manifest = ffsplit.compress(small_job.config(s3_uri, recipe=recipe, samples=40))
    assert away.struck
    assert verify(f"{s3_uri}/{manifest.run_key}").ok


@pytest.mark.subprocess
@long
def test_two_drivers_of_one_run_never_mix(small_job: SmallJob, tmp_path: Path) -> None:
    """Without Ray; the drill has two on one cluster."""
    ffsplit.compress(small_job.config(tmp_path / "undisturbed"))
    out = tmp_path / "out"
    arguments = command(small_job, out, "--runner", "serial")
    both = [subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert [code for _, code in ends] == [0, 0], ends
    assert verify(str(out)).ok
    assert committed_digests(out) == committed_digests(tmp_path / "undisturbed")
    assert len(list(out.glob("*/*/manifest.json"))) == 1


def marked(mark: str) -> list[int]:
    """The processes of this machine that have a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().get("FFSPLIT_MARK", "") and process.status() != "zombie":
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Any, *, within_s: float) -> float:
    """Seconds until a condition holds. Fails when it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within_s, "not in time"
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """A shell's background commands ignore SIGINT, and so does all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.subprocess
@long
@pytest.mark.ray
@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.parametrize("stage", ["calibrate", "compress", "heal", "measure"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing_running(
    stage: str, signum: signal.Signals, small_job: SmallJob, tmp_path: Path
) -> None:
    """Within ten seconds, whatever its workers are in the middle of."""
    temporary, mark, recipe = tmp_path / "tmp", uuid4().hex, small_job.recipe(**HEALED_SHARDS)
    temporary.mkdir()
    arguments = command(small_job, tmp_path / "out", "--workers", "2", "--log-format", "json")
    arguments[arguments.index("--recipe") + 1] = recipe
    before = {"calibrate": None, "compress": "calibrate", "heal": "compress", "measure": "heal"}[stage]
    with environment_of_ray(tmp_path, FFSPLIT_MARK=mark, TMPDIR=str(temporary)) as environment:
        process = subprocess.Popen(
            isolated(arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        lines: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
        reader.start()
        awaited = '"event": "note"' if before is None else f'"stage": "{before}", "num_items"'
        try:
            wait_until(lambda: any(awaited in line for line in list(lines)), within_s=180)
            time.sleep(0.2)
            process.send_signal(signum)
            wait_until(lambda: process.poll() is not None and not marked(mark), within_s=10)
        finally:
            process.terminate()
            process.wait(timeout=30)
    assert process.returncode == 130, lines
    assert not list((tmp_path / "out").glob("*/commit.json"))
    assert not list((tmp_path / "out").glob("*/*/manifest.json"))
    assert not list(temporary.iterdir())
