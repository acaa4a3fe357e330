"""A kill between any two writes costs at most the work in hand, and leaves nothing that misleads."""

from __future__ import annotations

import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit.store import cache as cache_module
from ffsplit.store import scratch as leases
from ffsplit.store.cache import Cache
from ffsplit.store.commits import latest_commit, list_runs
from ffsplit.store.gc import collect, plan
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from tests.faults.test_other_faults import long
from tests.faults.writes import KILLED, Ended, Writers
from tests.small_jobs import SmallJob, committed_digests

NUM_KILLS = int(os.environ.get("FFSPLIT_TEST_KILLS", "0"))
SEED = int(os.environ.get("FFSPLIT_TEST_SEED", "0"))
HEALING = "healing: {epochs: 1, batch_rows: 8, learning_rate: 0.002, evaluations: 1, checkpoint_minutes: 0}"
HEAL = "/heal/"


@pytest.fixture(scope="module")
def writers() -> Writers:
    return Writers.ready()


def config_of(job: SmallJob, out: Path | str, **fields: Any) -> ffsplit.JobConfig:
    return job.config(out, recipe=job.recipe(more=HEALING), healing_threads=1, **fields)


def steps_recorded(ended: Ended) -> list[int]:
    """The steps of healing whose state had its record."""
    records = [line for line in ended.writes if line.startswith("put_bytes") and "/progress-" in line]
    return [int(line.rpartition("-")[2].removesuffix(".json")) for line in records]


@pytest.mark.slow
def test_a_kill_between_any_two_writes_of_healing_costs_no_recorded_step(
    writers: Writers, small_job: SmallJob, tmp_path: Path
) -> None:
    whole = writers.run(config_of(small_job, tmp_path / "whole"), tmp_path / "log", only=HEAL)
    assert whole.exit_code == 0, whole
    assert steps_recorded(whole) == [1, 2, 3, 4, 5] and len(whole.writes) == 2 + 4 * 4 + 2
    expected = committed_digests(tmp_path / "whole")
    base = writers.run(config_of(small_job, tmp_path / "out"), tmp_path / "log", only=HEAL, after=0)
    assert base.exit_code == KILLED and not base.writes
    shutil.copytree(tmp_path / "out", tmp_path / "base")
    lost: dict[int, tuple[int, int]] = {}
    for after in range(len(whole.writes) + 1):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "base", tmp_path / "out")
        config = config_of(small_job, tmp_path / "out")
        killed = writers.run(config, tmp_path / "log", only=HEAL, after=after or None)
        assert killed.exit_code == (KILLED if after else 0)
        again = writers.run(config, tmp_path / "log", only=HEAL)
        assert again.exit_code == 0, again
        assert committed_digests(tmp_path / "out") == expected
        resumed = [int(event["step"]) for event in again.events if event["event"] == "resumed"]
        if ("heal", "healed") in again.items("started"):
            lost[after] = (steps_recorded(killed)[-1] if steps_recorded(killed) else 0, (resumed or [0])[-1])
    assert len(lost) >= len(whole.writes) - 1
    assert all(recorded == went_on for recorded, went_on in lost.values()), lost


@pytest.mark.s3
@long
def test_a_kill_between_writes_of_healing_in_a_bucket(
    writers: Writers, small_job: SmallJob, s3_uri: str, tmp_path: Path
) -> None:
    killed = writers.run(config_of(small_job, s3_uri), tmp_path / "log", only=HEAL, after=3)
    assert killed.exit_code == KILLED and steps_recorded(killed) == [1]
    again = writers.run(config_of(small_job, s3_uri), tmp_path / "log")
    assert again.exit_code == 0, again
    assert [event["step"] for event in again.events if event["event"] == "resumed"] == [1]


def spoilt(out: Path, again: Ended, before: Ended, expected: dict[str, str]) -> list[str]:
    """What a run that was killed and carried out once more has left that it should not have."""
    store = open_store(str(out))
    twice = before.items("finished") & again.items("started")
    problems = [f"computed twice: {twice}"] if twice else []
    problems += [] if again.exit_code == 0 else [f"ended with {again.exit_code}: {again.notes()}"]
    problems += [] if committed_digests(out) == expected else ["other bytes"]
    problems += [] if verify(str(out)).ok else ["not whole"]
    latest, listed = latest_commit(store), list_runs(store)
    problems += [] if latest and [run.commit for run in listed] == [latest] else ["index or hint behind"]
    if (out / ".scratch").exists():  # only the scratch of a run that was killed after its commit
        problems += [] if "committed already" in again.notes() else ["scratch left"]
        for owner in out.glob(".scratch/*/owners/*"):
            os.utime(owner, (0, 0))
    collect(store, plan(store, keep_last=1, min_age=leases.LEASE * 0))
    problems += ["scratch stays"] if (out / ".scratch").exists() else []
    attempts = list(out.glob("*/*/manifest.json"))
    return problems + ([] if len(attempts) == 1 else ["an attempt without a commit stays"])


SEAMS = {
    "before the owner": "put_bytes .scratch/*/owners/",
    "after the owner": "put_bytes .scratch/*/owners/",
    "before the manifest": "put_file */manifest.json",
    "before the commit": "put_if_absent */commit.json",
    "after the commit": "put_if_absent */commit.json",
    "between index and hint": "put_bytes index.json",
    "after the announcement": "put_bytes .scratch/*/owners/closing-",
    "in the midst of the removal": "delete_prefix .scratch/",
    "before the announcement goes": "delete .scratch/*/owners/closing-",
}


def place_of(seam: str, writes: list[str]) -> int:
    """After how many writes a run is at a seam."""
    method, pattern = SEAMS[seam].split(" ")
    parts = pattern.split("*")
    found = [
        number
        for number, line in enumerate(writes, start=1)
        if line.startswith(f"{method} ") and all(part in line for part in parts)
    ]
    return found[0] - 1 if seam.startswith("before") else found[0]


@pytest.mark.slow
def test_a_kill_at_the_seams_of_a_run(writers: Writers, small_job: SmallJob, tmp_path: Path) -> None:
    """Around the owner's record, the commit, the index and the hint, and in the removal; then at random."""
    whole = writers.run(config_of(small_job, tmp_path / "whole"), tmp_path / "log")
    expected = committed_digests(tmp_path / "whole")
    generator = random.Random(SEED)
    places = {seam: place_of(seam, whole.writes) for seam in SEAMS}
    places |= {f"{number}th": generator.randrange(len(whole.writes)) for number in range(NUM_KILLS)}
    found: dict[str, list[str]] = {}
    for name, after in places.items():
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        config = config_of(small_job, out)
        killed = writers.run(config, tmp_path / "log", after=after)
        assert killed.exit_code == KILLED, name
        again = writers.run(config, tmp_path / "log")
        if problems := spoilt(out, again, killed, expected):
            found[f"{name}, after {killed.writes[-1:]}"] = problems
    assert not found


def evict(root: Path, num_files: int) -> None:
    """Shrink a cache to nothing, and end after so many of its files have gone."""
    unlink, left = os.unlink, [num_files]

    def counted(path: Any, **options: Any) -> None:
        if left[0] == 0:
            os._exit(KILLED)
        left[0] -= 1
        unlink(path, **options)

    os.unlink = counted
    Cache(root, 0).shrink()


@pytest.mark.parametrize("num_files", [0, 1, 3])
def test_a_kill_in_the_midst_of_an_eviction(writers: Writers, tmp_path: Path, num_files: int) -> None:
    """What is half gone counts as missing, and is brought again whole."""
    names = [f"{number}.bin" for number in range(4)]

    def is_whole(directory: Path) -> bool:
        return all((directory / name).is_file() for name in names)

    def bring(target: Path, staging: Path) -> None:
        target.mkdir(parents=True)
        for name in names:
            (target / name).write_bytes(b"x")

    cache = Cache(tmp_path / "cache", 0)
    path = cache.get("a", is_whole=is_whole, bring=bring)
    for descriptor in cache_module._reading.values():
        os.close(descriptor)
    cache_module._reading.clear()
    os.utime(path, (0, 0))
    work = partial(evict, tmp_path / "cache", num_files)
    ended = writers.do(work, str(tmp_path / "out"), tmp_path / "log")
    assert ended.exit_code == KILLED
    assert len(list(path.iterdir())) == 4 - num_files
    assert (cache.find("a", is_whole=is_whole) is None) == (num_files > 0)
    assert is_whole(cache.get("a", is_whole=is_whole, bring=bring))
