"""Healing in processes of their own, started by Ray Train: the bytes of one process that does all shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from ffsplit.artifacts.scratch import Result, Scratch
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.distributed.runner import Runner, SerialRunner
from ffsplit.errors import CalibrationError, ConfigError
from ffsplit.healing.settings import HealingSettings
from ffsplit.models.source import ModelSource
from ffsplit.stages.heal import HealJob, heal_job
from ffsplit.stages.profile import ComputeProfile
from tests.conftest import CheckpointFactory
from tests.tiny_models import WORDS

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SIZE = 2


@pytest.fixture(scope="module")
def runner() -> Iterator[RayRunner]:
    with RayRunner(address="local", num_workers=1, processes_together=SIZE) as started:
        yield started


@pytest.fixture
def job(checkpoint_of: CheckpointFactory, tmp_path: Path) -> HealJob:
    rows = tuple(" ".join(WORDS[i : i + 3 + i % 5]) for i in range(40))
    return HealJob(
        original=ModelSource(path=str(checkpoint_of("bert"))),
        compressed=ModelSource(path=str(checkpoint_of("bert", seed=1))),
        rows=rows[:30],
        validation=rows[30:],
        max_length=32,
        batch_tokens=256,
        seed=0,
        settings=HealingSettings(epochs=2, batch_rows=8, learning_rate=1e-3, checkpoint_steps=2),
        quantization=None,
        linears="kept",
        scratch=Scratch(uri=str(tmp_path), prefix="run/heal"),
        profile=ComputeProfile(device="cpu", dtype="float32", threads=1),
        threads=1,
        workers=SIZE,
    )


def elsewhere(job: HealJob, name: str) -> HealJob:
    return job.model_copy(update={"scratch": job.scratch.model_copy(update={"prefix": f"{name}/heal"})})


def outcome(result: Result) -> tuple[object, ...]:
    return tuple(entry.sha256 for entry in result.files), result.facts


def heal_unless_killed(marker: Path, job: HealJob) -> Result | None:
    """The second process is gone, once, in a step after the first state was kept."""
    if distributed.get_rank() == 1 and not marker.exists():
        _die_in_step(4, marker)
    return heal_job(job)


def _die_in_step(fatal: int, marker: Path) -> None:
    from ffsplit.healing.step import Distillation

    go_on, num_steps = Distillation.set_gradient, 0

    def count(*arguments: Any, **options: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == fatal:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        go_on(*arguments, **options)

    Distillation.set_gradient = count  # type: ignore[method-assign]


def test_processes_give_the_bytes_of_one_that_does_all_shares_killed_or_not(
    runner: Runner, job: HealJob, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    together = runner.run_together("heal", partial(heal_unless_killed, marker), job, size=SIZE)
    assert marker.exists()
    alone = SerialRunner().run_together("heal", heal_job, elsewhere(job, "alone"), size=SIZE)
    assert together is not None
    assert alone is not None
    assert outcome(together) == outcome(alone)
    assert float(str(alone.facts["best_loss"])) < float(str(alone.facts["first_loss"]))
    state = job.scratch.load_newest("progress")
    assert state is not None  # it was resumed, not begun again
    assert job.settings.checkpoint_steps < 4


def fail(item: int) -> int:
    raise CalibrationError(f"item {item} cannot be done")


def test_an_error_arrives_as_itself(runner: Runner) -> None:
    with pytest.raises(CalibrationError, match="item 7 cannot be done"):
        runner.run_together("fail", fail, 7, size=SIZE)


def test_more_processes_than_the_cluster_has_room_for_are_refused_at_once(runner: Runner) -> None:
    with pytest.raises(ConfigError, match="--healing-workers 3: the cluster has 2 CPUs"):
        RayRunner(address=None, num_workers=1, processes_together=3).__enter__()
    with pytest.raises(ConfigError, match="3: the cluster has 2 CPUs"):
        runner.run_together("fail", fail, 7, size=3)
