"""A worker with several lanes is given several items at once, in threads, and gives the same bytes."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffsplit.calibration.sampling import CalibrationSettings
from ffsplit.compute_profile import ComputeProfile
from ffsplit.distributed.ray_pools import ActorPool
from ffsplit.distributed.runner import SerialRunner
from ffsplit.errors import CalibrationError
from ffsplit.models.fetch import ModelSource
from ffsplit.run.stages.calibrate import CalibrationJob, CalibrationWorker, Shard
from ffsplit.store.scratch import Scratch


class Meeting:
    """A worker whose items wait for each other, so that it ends only where `size` run at once."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)

    def __call__(self, item: int) -> int:
        self.barrier.wait()
        return item * item


def test_items_run_at_once_and_each_is_answered_with_its_index() -> None:
    answers = SerialRunner().map_workers("square", lambda: Meeting(3), [5, 6, 7, 8, 9, 10], lanes=3)
    assert sorted(answers) == [(index, item * item) for index, item in enumerate([5, 6, 7, 8, 9, 10])]


def test_an_error_ends_the_stage_before_items_that_wait() -> None:
    begun = []

    def fail(item: int) -> int:
        begun.append(item)
        raise CalibrationError(f"item {item} cannot be done")

    with pytest.raises(CalibrationError, match=r"item [01] cannot be done"):
        list(SerialRunner().map_workers("fail", lambda: fail, list(range(50)), lanes=2))
    assert set(begun) <= {0, 1}


def test_settings_of_the_process_hold_until_the_last_thread_is_done() -> None:
    profile = ComputeProfile(device="cpu", dtype="float32", threads=1)
    before = torch.are_deterministic_algorithms_enabled()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with profile.applied():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with profile.applied():
        thread.start()
        assert entered.wait(60)
    assert torch.are_deterministic_algorithms_enabled(), "another thread still computes"
    leave.set()
    thread.join()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_settings_of_one_thread_nest() -> None:
    profile = ComputeProfile(device="cpu", dtype="float32", threads=1)
    before = torch.get_num_threads()
    with profile.applied(threads=2):
        with profile.applied(threads=3):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 2 and torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == before


class Actors(ActorPool):
    """A pool whose actors are stand-ins."""

    made: int = 0

    def _made(self, slot: int) -> Any:
        self.made += 1
        return SimpleNamespace(
            number=self.made,
            ready=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None)),
        )

    def _watch(self, slot: int, reference: Any, *, ready: bool = False) -> None:
        pass


def test_lanes_are_opened_over_all_actors_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last worker of a short stage would have nothing to do."""
    killed: list[Any] = []
    monkeypatch.setattr("ffsplit.distributed.ray_pools.ray.kill", killed.append)
    pool = Actors(lambda: lambda item: item, stage="s", room=lambda: 2, options=dict, lanes=3)
    assert pool.room() == 6
    slots = [pool.open() for _ in range(6)]
    assert [pool._actors[slot].number for slot in slots] == [1, 2, 1, 2, 1, 2]
    for slot in slots[:4]:
        pool.close(slot)
    assert killed == [], "each actor has a lane that works"
    pool.close(slots[4])
    assert [each.number for each in killed] == [1]


def test_files_made_in_memory_are_stored_as_files_are(tmp_path: Path) -> None:
    contents = {f"part-{number}.bin": bytes([number]) * 1000 for number in range(9)}
    scratch = Scratch(uri=str(tmp_path / "out"), prefix=".scratch/key")
    paths = {}
    for name, data in contents.items():
        paths[name] = tmp_path / name
        paths[name].write_bytes(data)
    saved = scratch.save("one", paths, facts={"a": 1})
    made = ((name, lambda data=data: data) for name, data in contents.items())
    entries = scratch.part("again").put_each(made, num_threads=2)
    assert [(each.size_bytes, each.sha256) for each in entries] == [
        (each.size_bytes, each.sha256) for each in saved.files
    ]
    assert scratch.part("again").record("one", entries, facts={"a": 1}).facts == saved.facts
    assert scratch.part("again").load("one") is not None


def test_a_file_that_cannot_be_made_ends_the_work(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise CalibrationError("it is not finite")

    with pytest.raises(CalibrationError, match="not finite"):
        Scratch(uri=str(tmp_path), prefix="x").put_each([("a", bytes), ("b", fail)], num_threads=1)


def test_a_calibration_worker_with_lanes_gives_the_same_bytes(small_job: Any, tmp_path: Path) -> None:
    rows = [tuple(f"shard {index} row {row} of some text" for row in range(6)) for index in range(5)]
    shards = [Shard(index, each) for index, each in enumerate(rows)]
    found = []
    for name, lanes in (("one", 1), ("three", 3)):
        job = CalibrationJob(
            model=ModelSource(path=str(small_job.model)),
            settings=CalibrationSettings(sampled_tokens=64, max_length=16).settled(
                windows=False, max_positions=None
            ),
            num_shards=len(shards),
            seed=0,
            lineage={},
            profile=ComputeProfile(device="cpu", dtype="float32", threads=1),
            scratch=Scratch(uri=str(tmp_path / name), prefix=".scratch/key"),
        )
        factory = partial(CalibrationWorker, job)
        answers = dict(SerialRunner().map_workers("calibrate", factory, shards, lanes=lanes))
        found.append([[each.sha256 for each in answers[index].files] for index in range(len(shards))])
    assert found[0] == found[1]
