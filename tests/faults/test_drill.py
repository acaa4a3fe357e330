"""Nothing is lost: the drill of kills, in a network of its own where that is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.isolation import environment_of_ray, isolated

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.mark.subprocess
def test_kills_cost_at_most_the_work_in_hand(tmp_path: Path) -> None:
    kills, seed = os.environ.get("FFSPLIT_TEST_KILLS", "4"), os.environ.get("FFSPLIT_TEST_SEED", "0")
    command = [sys.executable, "-m", "tests.faults.drill", "--kills", kills, "--seed", seed]
    is_long = int(kills) > 10
    command += ["--side-by-side"] if is_long else []
    with environment_of_ray(tmp_path) as environment:
        done = subprocess.run(
            isolated([*command, "--folder", str(tmp_path)]),
            cwd=ROOT,
            env=environment,
            stdout=None if is_long else subprocess.PIPE,  # a long drill is watched as it goes
            stderr=subprocess.PIPE,
            text=True,
            timeout=120 + 120 * int(kills),
            check=False,
        )
    assert done.returncode == 0, (done.stdout or "") + done.stderr[-2000:]


@pytest.mark.skipif("FFSPLIT_TEST_MODELS" not in os.environ, reason="minutes on an idle machine")
@pytest.mark.subprocess
def test_a_batch_outlives_the_nodes_it_runs_on(tmp_path: Path) -> None:
    models, seed = os.environ["FFSPLIT_TEST_MODELS"], os.environ.get("FFSPLIT_TEST_SEED", "0")
    command = [sys.executable, "-m", "tests.faults.spot", "--models", models, "--seed", seed]
    command += ["--folder", str(tmp_path)]
    with environment_of_ray(tmp_path) as environment:
        done = subprocess.run(
            isolated(command),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600 + 120 * int(models),
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    print(done.stdout)
    assert f"{models} models in" in done.stdout and ", 0 problems" in done.stdout
