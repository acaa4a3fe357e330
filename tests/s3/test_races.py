"""Many at once: readers never see a part of an artifact, and of many writers one is the winner."""

from __future__ import annotations

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffsplit.artifacts.commits import Commit, read_commit
from ffsplit.artifacts.index import list_runs
from ffsplit.artifacts.locate import locate
from ffsplit.artifacts.publish import new_attempt_id
from ffsplit.artifacts.pull import download
from ffsplit.artifacts.stores import open_store
from ffsplit.artifacts.verify import verify
from ffsplit.errors import ConfigError
from tests.artifacts.attempts import RUN_KEY, publish, publish_directory, write_attempt
from tests.artifacts.test_locate import cache, is_whole
from tests.s3.loopback import S3Server

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]

NUM_READERS, NUM_PUBLISHES, NUM_WRITERS = 100, 50, 8
PAUSE_S = 10.0
"""Between two reads of a reader, on average, so that the publisher has its turn on a small machine."""


def test_readers_see_a_whole_artifact_or_none(uri: str, tmp_path: Path) -> None:
    """Every reader reads from before the first publish until after the last, and then once more."""
    done, problems, counts = threading.Event(), list[str](), [0] * NUM_READERS

    def read(number: int) -> None:
        done.wait(random.uniform(0, PAUSE_S))
        for last in (False, True):
            while last or not done.is_set():
                target = tmp_path / "readers" / f"{number}-{counts[number]}"
                try:
                    manifest = download(locate(uri), directory=target)
                    counts[number] += 1
                    if not is_whole(target) or (last and manifest.run_key != f"{NUM_PUBLISHES - 1:016x}"):
                        problems.append(f"{number}: {manifest.run_key} is not whole")
                    shutil.rmtree(target)
                except ConfigError as error:
                    if counts[number] or "no artifact" not in str(error):
                        problems.append(f"{number}: {error}")
                except Exception as error:
                    problems.append(f"{number}: {error!r}")
                if last:
                    break
                done.wait(random.uniform(0, 2 * PAUSE_S))

    store = open_store(uri)
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for number in range(NUM_READERS):
            readers.submit(read, number)
        try:
            for number in range(NUM_PUBLISHES):
                publish(store, tmp_path / f"attempt-{number}", run_key=f"{number:016x}")
        finally:
            done.set()
    assert problems == []
    assert min(counts) >= 1
    print(f"{sum(counts)} whole reads, {min(counts)} to {max(counts)} a reader")
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
