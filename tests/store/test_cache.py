"""The cache: one process brings, the others wait; what was used longest ago goes first."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffsplit.errors import ConfigError
from ffsplit.store import cache as module
from ffsplit.store.cache import Cache
from ffsplit.store.locks import locked, try_locked


@pytest.fixture(autouse=True)
def no_reader_stays() -> Iterator[None]:
    yield
    end_reading()


def end_reading() -> None:
    """As at the end of this process."""
    for descriptor in module._reading.values():
        os.close(descriptor)
    module._reading.clear()


def bring(cache: Cache, digest: str, *, size_bytes: int = 0) -> Path:
    def make(target: Path, staging: Path) -> None:
        target.mkdir(parents=True)
        (target / "data").write_bytes(b"x" * size_bytes)

    return cache.get(digest, is_whole=Path.is_dir, bring=make)


def test_one_brings_and_the_others_wait(tmp_path: Path) -> None:
    cache, calls, start = Cache(tmp_path, 10**9), [], threading.Barrier(6)

    def make(target: Path, staging: Path) -> None:
        calls.append(target)
        time.sleep(0.05)
        target.mkdir(parents=True)

    def want(_: int) -> Path:
        start.wait()
        return cache.get("digest", is_whole=Path.is_dir, bring=make)

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(want, range(6))) == {tmp_path / "artifacts" / "digest"}
    assert len(calls) == 1 and list((tmp_path / "locks").iterdir()) == []


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 250_000)
    for age, digest in ((5000, "a"), (4000, "b"), (3000, "c")):
        path = bring(Cache(tmp_path, 10**9), digest, size_bytes=100_000)
        os.utime(path, (time.time() - age,) * 2)
    end_reading()
    assert cache.find("a", is_whole=Path.is_dir)  # used just now
    end_reading()
    bring(cache, "d", size_bytes=10)
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["a", "c", "d"]


def old(path: Path) -> None:
    """Used last before the hours in which anything stays."""
    os.utime(path, (0, 0))


def test_what_is_arriving_stays_whatever_the_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 0)
    paths = [bring(cache, digest, size_bytes=100_000) for digest in "ab"]
    assert all(path.is_dir() for path in paths)
    end_reading()
    for path in paths:
        old(path)
    with locked(tmp_path / "locks" / "a"):
        cache.shrink()
    assert [path.is_dir() for path in paths] == [True, False]


def test_what_was_used_in_the_future_goes_too(tmp_path: Path) -> None:
    """The clock went back since."""
    path = bring(cache := Cache(tmp_path, 0), "a", size_bytes=100_000)
    end_reading()
    os.utime(path, (4e9, 4e9))
    cache.shrink()
    assert not path.exists()


READER = """
import sys
from pathlib import Path
from ffsplit.store.cache import Cache
path = Cache(Path(sys.argv[1]), 0).find("a", is_whole=Path.is_dir)
print("reading" if path else "missing", flush=True)
sys.stdin.readline()
print((path / "data").stat().st_size, flush=True)
"""


@pytest.mark.subprocess
def test_what_a_process_reads_stays_whatever_the_limit(tmp_path: Path) -> None:
    """It is larger than the limit by itself, was used long ago, and goes once its last reader has ended."""
    cache = Cache(tmp_path, 10)
    path = bring(cache, "a", size_bytes=100_000)
    end_reading()
    command = [sys.executable, "-c", READER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:  # type: ignore[call-overload]
        for reader in (one, two):
            assert reader.stdout.readline() == b"reading\n"
        for reader in (one, two):
            old(path)
            cache.shrink()
            reader.stdin.write(b"\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == b"100000\n"
            reader.wait()
            old(path)
        cache.shrink()
    assert not path.exists() and list((tmp_path / "readers").iterdir()) == []


def test_what_goes_while_it_is_looked_for_is_brought_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and the lock somebody shrinks the cache."""
    cache, read = Cache(tmp_path, 0), module._read
    path = bring(cache, "a", size_bytes=10)
    end_reading()
    old(path)

    def late(lock: Path) -> None:
        monkeypatch.setattr(module, "_read", read)
        cache.shrink()
        read(lock)

    monkeypatch.setattr(module, "_read", late)
    assert cache.find("a", is_whole=Path.is_dir) is None
    assert bring(cache, "a", size_bytes=20).is_dir()


def test_a_reader_whose_cache_was_cleared_by_hand_reads_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 0)
    bring(cache, "a", size_bytes=10)
    shutil.rmtree(tmp_path)
    path = bring(cache, "a", size_bytes=20)
    old(path)
    cache.shrink()
    assert (path / "data").stat().st_size == 20


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 10**9)
    path = bring(cache, "a", size_bytes=10)
    end_reading()

    def refuse(lock: Path) -> int:
        raise PermissionError("read-only")

    monkeypatch.setattr(module, "share", refuse)
    assert cache.find("a", is_whole=Path.is_dir) == path


def test_a_limit_that_is_no_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path))
    assert Cache.open() == Cache(tmp_path, 50 * 10**9)
    monkeypatch.setenv("FFSPLIT_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="FFSPLIT_CACHE_LIMIT much: give a size"):
        Cache.open()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="set FFSPLIT_CACHE"):
        bring(Cache(tmp_path / "file", 0), "a")


def test_without_a_home_directory_the_cache_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who needs the cache is told: most commands do not."""
    monkeypatch.delenv("FFSPLIT_CACHE", raising=False)
    monkeypatch.setattr(module, "home_directory", lambda: None)
    cache = Cache.open()
    with pytest.raises(ConfigError, match="no home directory for the cache: set FFSPLIT_CACHE"):
        bring(cache, "a")
    assert not cache.root.exists()


@pytest.mark.subprocess
def test_a_lock_holds_between_processes_and_dies_with_them(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from ffsplit.store.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with try_locked(tmp_path / "lock") as held:
            assert not held
        holder.kill()
    with try_locked(tmp_path / "lock") as held:
        assert held
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_comes_and_goes_is_never_held_twice(tmp_path: Path) -> None:
    inside: list[int] = []

    def hold(number: int) -> None:
        for _ in range(50):
            with locked(tmp_path / "lock"):
                inside.append(number)
                assert len(inside) == 1
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
