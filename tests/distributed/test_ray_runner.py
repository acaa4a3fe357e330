"""The Ray runner against its serial twin: same bytes, real overlap, errors that arrive as themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

import ffsplit
from ffsplit.distributed import make_runner, ray_runner
from ffsplit.distributed.observing import Observed
from ffsplit.distributed.ray_cluster import Host, Share, connect, disconnect, refusal
from ffsplit.distributed.ray_pools import OUT_OF_MEMORY, reason_of_loss
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.distributed.runner import Runner, SerialRunner
from ffsplit.errors import CalibrationError, ConfigError, FFSplitError
from ffsplit.machine import num_workers_here, usable_cores
from tests.distributed.test_dispatch import Pool
from tests.small_jobs import LOW_RANK, SmallJob, digests

pytestmark = pytest.mark.ray
WEIGHTS = ("*.safetensors", "stats/*.parquet", "config.json")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of this file, which the runners find started; with CPUs to spare."""
    connect("local", num_cpus=4)
    yield
    disconnect()


class Sleeper:
    """A worker that takes a moment, and says when, where and as which of its calls it ran."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, item: int) -> tuple[int, int, float, float, int]:
        started = time.time()
        time.sleep(0.2)
        self.num_calls += 1
        return item * item, os.getpid(), started, time.time(), self.num_calls


class Mortal:
    """Dies of item 5, once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        self.folder.mkdir(exist_ok=True)
        if item == 5 and not (self.folder / "died-5").exists():
            (self.folder / "died-5").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item


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
    assert overlap > 0
    assert max(answer[4] for answer in answers.values()) >= 3


@pytest.mark.matrix(num_workers=(2,), family=("bert",))
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


@pytest.mark.slow
def test_no_more_workers_than_there_is_room_for(local_ray: None) -> None:
    """An actor without a place would wait for ever, and its item with it."""
    with RayRunner(address=None, num_workers=64) as runner:
        assert runner.num_workers == 4
        answers = dict(runner.map_workers("sleep", Sleeper, list(range(9))))
    assert len(answers) == 9


def test_no_more_workers_than_this_machine_has_cores() -> None:
    cores = usable_cores()
    assert [num_workers_here(asked, threads=1, on_gpu=False) for asked in (None, 1, 64)] == [cores, 1, cores]
    assert num_workers_here(64, threads=1, on_gpu=True) == 64
    assert num_workers_here(4, threads=10 * cores, on_gpu=False) == 1


def test_more_gpus_than_there_are_are_refused_at_once(local_ray: None) -> None:
    runner: Runner = RayRunner(address=None, num_workers=1, gpus_per_worker=64)
    with pytest.raises(ConfigError, match="the cluster has"), runner:
        pass


def test_more_threads_than_any_node_has_cores_are_refused_at_once(local_ray: None) -> None:
    with (
        pytest.raises(ConfigError, match="a worker of 64 CPUs: no node of the cluster has that much"),
        RayRunner(address=None, num_workers=1, threads_per_worker=64),
    ):
        pass


def test_gpus_are_shared_by_fractions_of_one_or_taken_whole() -> None:
    host = {"CPU": 16.0, "GPU": 4.0}
    assert [Share(1, gpus).fits(host) for gpus in (0, 0.5, 0.4, 1, 2, 3, 8)] == [16, 8, 8, 4, 2, 1, 0]
    assert Share(8, 0.25).fits(host) == 2
    with pytest.raises(ConfigError, match="a fraction of one GPU, or whole GPUs"):
        Share(1, 1.5)


def test_another_version_of_ray_or_python_is_one_line() -> None:
    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "1.2.3", "python_version": "3.8.1"}, "node 10.0.0.1")
    line = refusal("10.0.0.1:6379", str(mismatch.value))
    assert "10.0.0.1:6379 runs Ray 1.2.3 on Python 3.8.1, this machine Ray" in line
    assert "\n" not in line


def test_what_is_measured_shares_its_node_with_nobody(local_ray: None) -> None:
    """Two runs on one cluster: whichever comes first, the other waits."""
    spans: list[tuple[float, float]] = []

    def other_run() -> None:
        with RayRunner(address=None, num_workers=2) as runner:
            spans.extend(answer[2:4] for _, answer in runner.map_tasks("sleep", Sleeper(), list(range(8))))

    thread = threading.Thread(target=other_run)
    with RayRunner(address=None, num_workers=2) as runner:
        thread.start()
        answer = runner.run_alone("measure", Sleeper(), 3, reserved=True)
        thread.join()
    started, ended = answer[2:4]
    assert len(spans) == 8
    assert not [span for span in spans if span[0] < ended and started < span[1]]


def test_every_host_is_asked_once(local_ray: None) -> None:
    with RayRunner(address=None, num_workers=2) as runner:
        assert list(runner.on_every_host("square", square, 5).values()) == [25]
        assert not runner.is_spread
        with pytest.raises(CalibrationError, match="item 3"):
            runner.on_every_host("fail", fail, 3)


def sleep_if_told(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


class Doomed:
    def __call__(self, item: int) -> int:
        return die(item)


def test_a_host_that_does_not_answer_is_named_in_time(local_ray: None) -> None:
    with RayRunner(address=None, num_workers=2) as runner:
        with pytest.raises(FFSplitError, match=r"inputs: 1 of 1 hosts did not answer in 0\.5 s \(.+/.+\): "):
            runner.on_every_host("inputs", sleep_if_told, 600.0, within_s=0.5)
        assert list(runner.on_every_host("inputs", sleep_if_told, 0.0).values()) == [0.0]


@pytest.mark.slow
def test_a_host_whose_process_was_ended_did_not_leave(local_ray: None) -> None:
    with (
        RayRunner(address=None, num_workers=2) as runner,
        pytest.raises(FFSplitError, match=r"inputs: host .+ did not answer: its process died$"),
    ):
        runner.on_every_host("inputs", die, 1)


@pytest.mark.matrix(kind=("tasks",))
@pytest.mark.parametrize("kind", ["tasks", "workers"])
def test_a_process_that_was_killed_was_not_out_of_memory(local_ray: None, kind: str) -> None:
    """Ray's own words name memory among the causes that a death may have."""
    with RayRunner(address=None, num_workers=1) as runner:
        lost = (
            runner.map_tasks("s", Doomed(), [1]) if kind == "tasks" else runner.map_workers("s", Doomed, [1])
        )
        with pytest.raises(FFSplitError, match="item 0 lost 4 workers, the last because its process died;"):
            list(lost)
        assert ray.util.list_named_actors() == []


def test_memory_is_the_reason_where_ray_says_so() -> None:
    said = "3 worker(s) were killed due to the node running low on memory. Refer to the documentation"
    for error in (OutOfMemoryError(said), NodeDiedError(said)):
        assert reason_of_loss(error) == OUT_OF_MEMORY
    assert reason_of_loss(WorkerCrashedError()) == "its process died"
    maybe = "(1) the process was killed by the OOM killer due to high memory usage, (2) ray stop"
    assert reason_of_loss(NodeDiedError(maybe)) == "its host left"
    assert reason_of_loss(ValueError("no memory of it")) is None


def test_what_goes_wrong_with_an_answer_ends_the_stage(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Ray's own thread, where an exception is dropped: the stage would wait for ever."""

    def fail(self: Any, reason: str) -> None:
        raise KeyError("a fault of our own")

    monkeypatch.setattr(Observed, "lost", fail)
    with RayRunner(address=None, num_workers=1) as runner, pytest.raises(KeyError, match="of our own"):
        list(runner.map_tasks("s", Doomed(), [1]))


def test_a_worker_that_dies_costs_the_item_in_hand(local_ray: None, tmp_path: Path) -> None:
    with RayRunner(address=None, num_workers=2) as runner:
        answers = dict(runner.map_workers("mortal", partial(Mortal, tmp_path), list(range(12))))
        assert answers == {index: index for index in range(12)}
        answers = dict(runner.map_tasks("mortal", Mortal(tmp_path / "tasks"), list(range(12))))
        assert answers == {index: index for index in range(12)}
    assert sorted(path.name for path in tmp_path.rglob("died-*")) == ["died-5", "died-5"]


@pytest.mark.subprocess
@pytest.mark.slow
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


class OddError(Exception):
    """An error that cannot be unpickled: its constructor takes no single string."""

    def __init__(self, code: int, place: str) -> None:
        super().__init__(f"\ncode {code}\nin {place}")


def odd(item: int) -> int:
    raise OddError(item, "the library")


def odd_worker() -> Callable[[int], int]:
    raise OddError(7, "the library")


@pytest.mark.parametrize("make", [SerialRunner, partial(RayRunner, address=None, num_workers=1)])
def test_whatever_a_library_raises_in_a_worker_is_one_line(
    local_ray: None, make: Callable[[], Runner]
) -> None:
    """The traceback from there is in its causes, for --debug."""
    with make() as runner:
        asked: list[Callable[[], object]] = [
            lambda: list(runner.map_tasks("odd", odd, [3])),
            lambda: list(runner.map_workers("odd", lambda: odd, [3])),
            lambda: runner.run_alone("odd", odd, 3),
            lambda: runner.on_every_host("odd", odd, 3),
            lambda: runner.run_together("odd", odd, 3, size=1),
        ]
        for ask in asked:
            with pytest.raises(FFSplitError, match=r"^odd failed: code 3$") as caught:
                ask()
            assert "in odd\n" in "".join(traceback.format_exception(caught.value))
        with pytest.raises(FFSplitError, match=r"^odd failed: code 7$"):
            list(runner.map_workers("odd", odd_worker, [3]))


@pytest.mark.parametrize(
    ("gpus", "device", "expected"), [(0, "cuda", 1.0), (0.5, "cuda", 0.5), (0, "cpu", 0.0)]
)
def test_work_on_gpus_takes_a_whole_one_unless_told_otherwise(
    small_job: SmallJob, tmp_path: Path, gpus: float, device: str, expected: float
) -> None:
    fields = {"runner": "ray", "device": device, "gpus_per_worker": gpus}
    runner = make_runner(small_job.config(tmp_path / "out", **fields))
    assert isinstance(runner, RayRunner)
    assert runner._options()["num_gpus"] == expected


def test_a_stage_that_nobody_reads_to_its_end_is_closed_on_exit() -> None:
    pool = Pool([2])
    runner = RayRunner(address=None, num_workers=2)
    answers = runner._dispatch(pool, range(9), stage="s")
    next(answers)
    assert pool.open_now
    runner.__exit__(None, None, None)
    assert not pool.open_now
    assert list(answers) == []


def test_a_cluster_that_has_yet_to_grow_has_no_host_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runner, "hosts", lambda share: [])
    assert RayRunner(address=None, num_workers=2).on_every_host("square", square, 5) == {}


def test_a_host_that_left_has_no_say(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ray_runner.hosts(Share(1, 0))
    gone = Host("e" * len(here[0].id), "gone", {"CPU": 1.0})
    monkeypatch.setattr(ray_runner, "hosts", lambda share: [*here, gone])
    with RayRunner(address=None, num_workers=2) as runner:
        assert runner.on_every_host("square", square, 5) == {here[0].name: 25}
