"""Temporary files go with their process, in order or not; those of the living stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORK = """
import sys, time
from ffsplit.temporary import process_folder, temporary_folder
with temporary_folder() as folder:
    (folder / "file").write_text("some bytes")
    (process_folder() / "download").write_text("more")
    print(process_folder(), flush=True)
    sys.stdin.readline()
"""
LOOK = "from ffsplit.temporary import remove_abandoned; remove_abandoned()"


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


def test_a_process_that_ends_leaves_nothing(tmp_path: Path) -> None:
    with at_work(tmp_path) as (_, folder):
        assert folder.parent == tmp_path and (folder / "download").exists()
        assert len(list(folder.glob("*/file"))) == 1
    assert not list(tmp_path.iterdir())


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


def test_the_next_process_that_needs_a_folder_looks(tmp_path: Path) -> None:
    with at_work(tmp_path) as (killed, left):
        killed.kill()
        killed.wait()
        with at_work(tmp_path) as (_, next_one):
            assert list(tmp_path.iterdir()) == [next_one]
    assert not left.exists()
