"""Many at once: readers never see a part of an artifact, and of many writers one is the winner."""

from __future__ import annotations

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffsplit.errors import ConfigError
from ffsplit.store.artifact import locate
from ffsplit.store.commits import Commit, list_runs, read_commit
from ffsplit.store.publish import new_attempt_id
from ffsplit.store.pull import download, verify
from ffsplit.store.store import open_store
from tests.s3.loopback import S3Server
from tests.store.attempts import RUN_KEY, publish, publish_directory, write_attempt
from tests.store.test_artifact import cache, is_whole

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]

NUM_READERS, NUM_PUBLISHES, NUM_WRITERS = 100, 50, 8
ROUNDS = (0, 10, 20, 30, 40, 49)
"""The publishes during which every reader reads, so that a slow server has no more to do than a fast one."""


def test_readers_see_a_whole_artifact_or_none(uri: str, tmp_path: Path) -> None:
    """A hundred readers at once: from the first publish on, during later ones, and after the last.

    Publishing goes on meanwhile, however long they take, and none is given less than there was when it began.
    """
    begun, num_published = [threading.Event() for _ in range(NUM_PUBLISHES + 1)], 0
    problems, early = list[str](), list[int]()

    def read(number: int) -> int:
        target, num_whole = tmp_path / "readers" / f"{number}", 0
        for publish_number in (*ROUNDS, NUM_PUBLISHES):
            begun[publish_number].wait()
            time.sleep(random.uniform(0, 0.5))
            there = num_published
            try:
                manifest = download(locate(uri), directory=target)
                if not is_whole(target) or int(manifest.run_key, 16) < there - 1:
                    problems.append(f"{number}: {manifest.run_key} when {there} were there, or not whole")
                shutil.rmtree(target)
                num_whole += 1
            except ConfigError as error:
                if there or "no artifact" not in str(error):
                    problems.append(f"{number}: {error}")
                early.append(number)
            except Exception as error:
                problems.append(f"{number}: {error!r}")
        return num_whole

    store = open_store(uri)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        readers = [pool.submit(read, number) for number in range(NUM_READERS)]
        try:
            for number in range(NUM_PUBLISHES):
                begun[number].set()
                publish(store, tmp_path / f"attempt-{number}", run_key=f"{number:016x}")
                num_published = number + 1
        finally:
            for each in begun:
                each.set()
    assert problems == []
    assert sum(each.result() for each in readers) + len(early) == NUM_READERS * (len(ROUNDS) + 1)
    assert all(each.result() >= len(ROUNDS) for each in readers)
    assert len(list_runs(store)) == NUM_PUBLISHES


@pytest.mark.parametrize("round_number", range(3))
def test_eight_writers_race_for_one_run(
    server: S3Server, uri: str, tmp_path: Path, round_number: int
) -> None:
    attempts, start = [new_attempt_id() for _ in range(NUM_WRITERS)], threading.Barrier(NUM_WRITERS)
    for attempt in attempts:
        write_attempt(tmp_path / attempt, attempt=attempt)

    def race(attempt: str) -> Commit:
        store = open_store(uri)
        start.wait()
        return publish_directory(store, tmp_path / attempt, attempt=attempt)

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        told = [commit.attempt for commit in pool.map(race, attempts)]
    store = open_store(uri)
    commit = read_commit(store, RUN_KEY)
    assert commit and verify(uri).ok and verify(f"{uri}/{RUN_KEY}").ok
    if server.atomic_create:
        assert set(told) == {commit.attempt}
        assert store.list_directories(RUN_KEY) == [commit.attempt]
    else:
        assert commit.attempt in told
        assert commit.attempt in store.list_directories(RUN_KEY)
