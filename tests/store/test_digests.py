import hashlib
import os
from pathlib import Path

import pytest

from ffsplit.errors import ArtifactError
from ffsplit.store.entries import file_entries, file_entry, sha256_file


def test_entries_are_sorted_complete_and_true(tmp_path: Path) -> None:
    big = os.urandom((1 << 20) + 7)
    files = {"b.bin": big, "a/z": b"", "a.txt": b"a", "sub/manifest.json": b"{}"}
    for name, data in {**files, "manifest.json": b"{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    entries = file_entries(tmp_path)
    assert [entry.path for entry in entries] == ["a.txt", "a/z", "b.bin", "sub/manifest.json"]
    for entry in entries:
        assert entry.size_bytes == len(files[entry.path])
        assert entry.sha256 == hashlib.sha256(files[entry.path]).hexdigest()
    assert sha256_file(tmp_path / "b.bin") == hashlib.sha256(big).hexdigest()


@pytest.mark.parametrize("target", ["file", "directory", "nowhere"])
def test_symbolic_links_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / target)
    with pytest.raises(ArtifactError, match="in/link is a symbolic link"):
        file_entries(tmp_path / "in")


def test_what_no_store_can_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "back\\slash").write_text("x")
    with pytest.raises(ArtifactError, match="is not a valid file name"):
        file_entries(tmp_path)
    (tmp_path / "back\\slash").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="neither a file nor a directory"):
        file_entries(tmp_path)
    with pytest.raises(ArtifactError, match="cannot read"):
        file_entries(tmp_path / "nowhere")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*/gone\.bin: No such file"):
        file_entry(tmp_path / "gone.bin", "gone.bin")
