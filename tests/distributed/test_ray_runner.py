"""The Ray runner against its serial twin: same bytes, real overlap, errors that arrive as themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.distributed.runner import Runner, SerialRunner
from ffsplit.errors import CalibrationError, ConfigError
from tests.small_jobs import LOW_RANK, SmallJob, digests

pytestmark = pytest.mark.ray
WEIGHTS = ("*.safetensors", "stats/*.parquet", "config.json")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of this file, which the runners find started."""
    with RayRunner(address="local", num_workers=4):
        yield


class Sleeper:
    """A worker that takes a moment, and says when, where and as which of its calls it ran."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, item: int) -> tuple[int, int, float, float, int]:
        started = time.time()
        time.sleep(0.2)
        self.num_calls += 1
        return item * item, os.getpid(), started, time.time(), self.num_calls


def square(item: int) -> int:
    return item * item


def fail(item: int) -> int:
    raise CalibrationError(f"item {item} cannot be done")


@pytest.mark.parametrize("make", [SerialRunner, lambda: RayRunner(address=None, num_workers=2)])
def test_every_item_is_answered_once(make: Any, local_ray: None) -> None:
    with make() as runner:
        answers = list(runner.map_tasks("square", square, list(range(20))))
        assert sorted(answers) == [(item, item * item) for item in range(20)]
        assert list(runner.map_tasks("square", square, [])) == []
        assert runner.run_alone("square", square, 7) == 49
        with pytest.raises(CalibrationError, match="item 3 cannot be done"):
            list(runner.map_tasks("fail", fail, [3]))


def test_workers_keep_their_state_and_overlap_in_time(local_ray: None) -> None:
    with RayRunner(address=None, num_workers=2) as runner:
        answers = dict(runner.map_workers("sleep", Sleeper, list(range(30))))
    assert {index: answer[0] for index, answer in answers.items()} == {i: i * i for i in range(30)}
    by_process: dict[int, list[tuple[float, float]]] = {}
    for _, process, started, ended, _ in answers.values():
        by_process.setdefault(process, []).append((started, ended))
    assert len(by_process) == 2
    first, second = (sorted(spans) for spans in by_process.values())
    overlap = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)
    assert overlap > 0.2
    assert max(answer[4] for answer in answers.values()) >= 3


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_serial_bytes(
    family: str, num_workers: int, small_job: SmallJob, tmp_path: Path, checkpoint_of: Any, local_ray: None
) -> None:
    model = str(checkpoint_of(family, head="ForCausalLM") if family == "llama" else small_job.model)
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK) if family == "llama" else small_job.recipe()
    common: dict[str, Any] = {"model": model, "recipe": recipe}
    ffsplit.compress(small_job.config(tmp_path / "serial", **common))
    ffsplit.compress(small_job.config(tmp_path / "ray", runner="ray", workers=num_workers, **common))
    assert digests(tmp_path / "ray", *WEIGHTS) == digests(tmp_path / "serial", *WEIGHTS)


def test_no_more_workers_than_there_is_room_for(local_ray: None) -> None:
    """An actor without a place would wait for ever, and its item with it."""
    with RayRunner(address=None, num_workers=64) as runner:
        assert runner.num_workers == 4
        answers = dict(runner.map_workers("sleep", Sleeper, list(range(9))))
    assert len(answers) == 9


def test_more_gpus_than_there_are_are_refused_at_once(local_ray: None) -> None:
    runner: Runner = RayRunner(address=None, num_workers=1, gpus_per_worker=64)
    with pytest.raises(ConfigError, match="the cluster has"), runner:
        pass


def test_an_unreachable_cluster_is_one_line(small_job: SmallJob, tmp_path: Path) -> None:
    """In a process of its own: this one is connected to a cluster already."""
    code = "import sys; from ffsplit.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = small_job.arguments(tmp_path / "out", "--address", "127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-c", code, "compress", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "ffsplit: Ray at 127.0.0.1:1 cannot be reached" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
