"""Healing in processes of their own, started by Ray Train: the bytes of one process that does all shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from torch import distributed

from ffsplit.compute_profile import ComputeProfile
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.distributed.ray_train import MAX_RETRIES, Together, place, run_together
from ffsplit.distributed.runner import Runner, SerialRunner
from ffsplit.errors import CalibrationError, ConfigError, FFSplitError
from ffsplit.healing.settings import HealingSettings
from ffsplit.models.fetch import ModelSource
from ffsplit.run.stages.heal import HealJob, heal_job
from ffsplit.store.scratch import Result, Scratch
from tests.conftest import CheckpointFactory
from tests.tiny_models import WORDS

SIZE = 2


def on_ray(test: Any) -> Any:
    """A test that starts processes."""
    return pytest.mark.ray(pytest.mark.slow(test))


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
        settings=HealingSettings(
            epochs=2,
            batch_rows=8,
            batch_tokens=2048,
            learning_rate=1e-3,
            mixed_precision="no",
            checkpoint_minutes=0,
        ),
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
    from ffsplit.healing.gradient import Distillation

    go_on, num_steps = Distillation.set_gradient, 0

    def count(*arguments: Any, **options: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == fatal:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        go_on(*arguments, **options)

    Distillation.set_gradient = count  # type: ignore[method-assign]


@on_ray
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
    assert job.settings.checkpoint_minutes == 0


def fail(item: int) -> int:
    raise CalibrationError(f"item {item} cannot be done")


@on_ray
def test_an_error_arrives_as_itself(runner: Runner) -> None:
    with pytest.raises(CalibrationError, match="item 7 cannot be done"):
        runner.run_together("fail", fail, 7, size=SIZE)


@on_ray
def test_more_processes_than_the_cluster_has_room_for_are_refused_at_once(runner: Runner) -> None:
    with pytest.raises(ConfigError, match="--healing-workers 3: the cluster has 2 CPUs"):
        RayRunner(address=None, num_workers=1, processes_together=3).__enter__()
    with pytest.raises(ConfigError, match="3: the cluster has 2 CPUs"):
        runner.run_together("fail", fail, 7, size=3)


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[int]:
    """Let all processes end with one error after another, then with 7; the items of each attempt."""
    items, left = list[int](), list(errors)

    def fit(self: Together, item: int) -> int:
        items.append(item)
        if left:
            raise left.pop(0)
        return 7

    monkeypatch.setattr(Together, "_fit", fit)
    return items


def of_workers(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("some", dict(enumerate(errors)))


TOGETHER = Together(fail, size=2, cpus=1, gpus=0.0)


def test_lost_processes_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    items = failing(monkeypatch, *[of_workers(WorkerCrashedError())] * MAX_RETRIES)
    assert run_together(TOGETHER, 3) == 7 and items == [3] * (1 + MAX_RETRIES)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            of_workers(RuntimeError("a peer is gone"), WorkerCrashedError()),
            "2 processes that work together were lost 4 times, the last because its process died; .*resumes",
        ),
        (of_workers(RuntimeError("no backend")), "2 processes together: RuntimeError: no backend"),
        (ControllerError(RuntimeError("no room")), "2 processes together: ControllerError: .*no room"),
    ],
)
def test_processes_that_fail_again_and_again_say_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    items = failing(monkeypatch, *[error] * (1 + MAX_RETRIES))
    with pytest.raises(FFSplitError, match=message):
        run_together(TOGETHER, 3)
    assert len(items) == 1 + MAX_RETRIES


def test_an_error_of_ours_ends_all_processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However Ray wraps it."""
    wrapped = RayTaskError("f", "trace", CalibrationError("no tokens"))
    items = failing(monkeypatch, of_workers(RuntimeError("a peer is gone"), wrapped))
    with pytest.raises(CalibrationError, match="no tokens"):
        run_together(TOGETHER, 3)
    assert items == [3]


def test_a_ray_that_is_too_old_for_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.59.1")
    with pytest.raises(ConfigError, match=r"--healing-workers 2 needs Ray 2\.60 or newer: pip install"):
        place(fail, size=2, threads=1, use_gpus=False)
