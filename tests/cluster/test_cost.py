"""cost.py: seconds from a manifest, prices from the caller, and nothing made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ffsplit.store.manifest import Stage
from ffsplit.store.store import open_store
from tests.cluster.files import CLUSTER, ROOT
from tests.store.attempts import ATTEMPT, RUN_KEY, make_manifest


def cost(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLUSTER / "cost.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def published(tmp_path: Path) -> str:
    stages = (
        Stage(name="calibrate", key="a", num_items=10, num_reused=4, wall_s=1800.0),
        Stage(name="measure", key="b", num_items=1, num_reused=0, wall_s=360.0),
    )
    manifest = make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).model_copy(update={"stages": stages})
    store = open_store(str(tmp_path))
    store.put_bytes("manifest.json", manifest.model_dump_json().encode())
    return str(tmp_path)


@pytest.mark.subprocess
def test_seconds_times_prices(published: str) -> None:
    done = cost(published, "--head-price", "0.5", "--worker-price", "2", "--workers", "4", "--start-s", "180")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert rows["start"].split()[1:] == ["180.0", "s", f"{180 / 3600 * 8.5:.4f}"]
    assert rows["calibrate"].split()[1:4] == ["1800.0", "s", "4.2500"]
    assert "(4 of 10 reused)" in rows["calibrate"]
    assert rows["total"].split()[1:] == ["2340.0", "s", f"{2340 / 3600 * 8.5:.4f}"]


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "arguments",
    [
        ("--head-price", "1", "--worker-price", "1"),
        ("--head-price", "-1", "--worker-price", "1", "--workers", "1"),
        ("--head-price", "1", "--worker-price", "nan", "--workers", "1"),
        ("--head-price", "1", "--worker-price", "1", "--workers", "0"),
    ],
)
def test_no_price_is_assumed(published: str, arguments: tuple[str, ...]) -> None:
    assert cost(published, *arguments).returncode == 2


@pytest.mark.subprocess
def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = cost(str(tmp_path / "none"), "--head-price", "1", "--worker-price", "1", "--workers", "1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
