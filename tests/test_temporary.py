"""Temporary files go with their process, in order or not; those of the living stay."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ffsplit import directories as temporary
from ffsplit.directories import PREFIX, full_disk_explained
from ffsplit.errors import FFSplitError, StoreError

WORK = """
import sys, time
from ffsplit.directories import process_folder, temporary_folder
with temporary_folder() as folder:
    (folder / "file").write_text("some bytes")
    (process_folder() / "download").write_text("more")
    print(process_folder(), flush=True)
    sys.stdin.readline()
"""
LOOK = "from ffsplit.directories import remove_abandoned; remove_abandoned()"


@contextmanager
def at_work(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with temporary files, and where they are; it ends when a line is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK],
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.communicate("\n")


def look(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", LOOK], env=os.environ | {"TMPDIR": str(folder)}, check=True)


@pytest.mark.subprocess
def test_a_process_that_ends_leaves_nothing(tmp_path: Path) -> None:
    with at_work(tmp_path) as (_, folder):
        assert folder.parent == tmp_path and (folder / "download").exists()
        assert len(list(folder.glob("*/file"))) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.subprocess
def test_what_was_killed_is_cleared_away_and_what_lives_is_not(tmp_path: Path) -> None:
    foreign, elsewhere = tmp_path / "ffsplit-notes", tmp_path / "ffsplit-work-link"
    foreign.mkdir()
    elsewhere.symlink_to(foreign)
    with at_work(tmp_path) as (killed, left), at_work(tmp_path) as (_, kept):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "download").exists()
        look(tmp_path)
        assert not left.exists()
        assert (kept / "download").exists() and list(kept.glob("*/file"))
    assert sorted(tmp_path.iterdir()) == [foreign, elsewhere]


@pytest.mark.subprocess
def test_the_next_process_that_needs_a_folder_looks(tmp_path: Path) -> None:
    with at_work(tmp_path) as (killed, left):
        killed.kill()
        killed.wait()
        with at_work(tmp_path) as (_, next_one):
            assert list(tmp_path.iterdir()) == [next_one]
    assert not left.exists()


def write_to_a_full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("text")


def fail_as_a_library_does() -> None:
    raise RuntimeError("IO error: No space left on device (os error 28)")


@pytest.mark.parametrize("fill", [write_to_a_full_disk, fail_as_a_library_does])
def test_a_full_disk_is_told_whoever_met_it(fill: Any) -> None:
    with pytest.raises(FFSplitError, match=r"no space left for .* set TMPDIR"), full_disk_explained():
        fill()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StoreError("No space left on device")])
def test_other_failures_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, full_disk_explained():
        raise error
    assert caught.value is error


def test_a_folder_that_was_taken_away_before_it_had_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that took it for one without a holder."""
    made: list[Path] = []
    make, flock = tempfile.mkdtemp, fcntl.flock

    def made_by(**options: Any) -> str:
        made.append(Path(make(**options)))
        return str(made[-1])

    def taken_away(*given: Any) -> None:
        made[-1].rmdir()
        if len(made) == 2:
            made[-1].mkdir()  # another folder of its name is not it either
        flock(*given)
        if len(made) == 2:
            monkeypatch.setattr(fcntl, "flock", flock)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", made_by)
    monkeypatch.setattr(fcntl, "flock", taken_away)
    folder = temporary._folder_of.__wrapped__(os.getpid())
    assert folder == made[2] and folder.is_dir() and folder.name.startswith(PREFIX)
    assert temporary._lock(folder) is None, "it is held"
    assert temporary._lock(made[0]) is None, "it is gone"


def test_a_forked_child_leaves_the_folder_to_its_parent(tmp_path: Path) -> None:
    temporary._remove(tmp_path, os.getppid())
    assert tmp_path.is_dir()
