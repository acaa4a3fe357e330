"""What is special about directories: file systems that refuse, leftovers, links, threads."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffsplit.errors import ConfigError, StoreError
from ffsplit.store.local import LocalStore


def tree(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def test_check_writable_removes_the_directories_it_made(tmp_path: Path) -> None:
    LocalStore(tmp_path / "a" / "b" / "c").check_writable()
    assert tree(tmp_path) == set()
    (tmp_path / "a").mkdir()
    LocalStore(tmp_path / "a" / "b").check_writable()
    assert tree(tmp_path) == {"a"}


def test_checking_from_many_threads_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for check in [pool.submit(LocalStore(tmp_path / "a" / "b").check_writable) for _ in range(100)]:
            check.result()
    assert tree(tmp_path) <= {"a", "a/b"}  # a check may find directories that another has just made


def test_check_writable_when_a_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "new" / ".." / "file"):
        with pytest.raises(ConfigError, match="is a file, not a directory: choose another") as caught:
            LocalStore(root).check_writable()
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_check_writable_in_proc() -> None:
    with pytest.raises(ConfigError, match=r"cannot write to /proc/ffsplit/out: .*choose another"):
        LocalStore(Path("/proc/ffsplit/out")).check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="permission denied"):
        LocalStore(tmp_path / "out").check_writable()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(1, "no hard links"), (13, "permission denied"), (28, "no space left"), (30, "read-only")],
    ids=str,
)
def test_check_writable_says_why_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigError, match=reason):
        LocalStore(tmp_path / "a" / "b").check_writable()
    assert tree(tmp_path) == set()


def test_a_directory_that_may_not_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for an empty one: what is in it would count as gone."""

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    store = LocalStore(tmp_path)
    store.put_bytes("key", b"")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match=f"cannot list {tmp_path}: permission denied"):
        list(store.list(""))


def test_a_failed_write_leaves_the_old_value_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("key", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="no space left"):
        store.put_bytes("key", b"new")
    with pytest.raises(StoreError, match="no space left"):
        store.put_if_absent("other", b"new")
    assert tree(tmp_path) == {"key"}
    assert store.get_bytes("key") == b"old"


def test_a_source_that_changes_while_copied_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"whole")
    monkeypatch.setattr("ffsplit.store.local.read_chunks", lambda path: [b"who"])
    with pytest.raises(StoreError, match="changed while it was copied"):
        LocalStore(tmp_path / "store").put_file("key", source)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_lost_reply_to_a_link_counts_as_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_then_complain(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(17, "File exists", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link_then_complain)
    assert LocalStore(tmp_path).put_if_absent("key", b"mine")
    assert tree(tmp_path) == {"key"}


def test_one_of_many_threads_creates_a_key(tmp_path: Path) -> None:
    store, start = LocalStore(tmp_path / "root"), threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return store.put_if_absent("a/b/key", bytes([number]) * 1000)

    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.get_bytes("a/b/key") == bytes([won.index(True)]) * 1000
        store.delete_prefix("a")
    assert tree(tmp_path) == {"root"}


def test_writing_while_another_cleans_up_the_same_parents(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def come_and_go(number: int) -> None:
        for _ in range(50):
            store.put_bytes(f"run/{number}/x", b"")
            store.delete_prefix(f"run/{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert tree(tmp_path) == set()


def test_a_reader_sees_the_old_value_or_the_new(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    values = {bytes([number]) * 500_000 for number in range(6)}
    store.put_bytes("key", min(values))
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(store.put_bytes, "key", value) for value in values]
        while not all(write.done() for write in writes):
            assert store.get_bytes("key") in values
            assert list(store.list("")) == ["key"]
    assert tree(tmp_path) == {"key"}


def test_symbolic_links_are_listed_but_never_read(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    store = LocalStore(tmp_path / "store")
    store.put_bytes("real", b"")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "secret" / "key")
    (tmp_path / "store" / "tree").symlink_to(tmp_path / "secret")
    assert list(store.list("")) == ["link", "real", "tree"]
    for read in (store.get_bytes, lambda key: store.fetch(key, tmp_path)):
        with pytest.raises(StoreError, match="is a symbolic link"):
            read("link")


def test_fetch_is_in_place(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put_bytes("a/b", b"x")
    assert store.fetch("a/b", tmp_path / "elsewhere") == tmp_path / "store" / "a" / "b"
    assert not (tmp_path / "elsewhere").exists()


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStore(tmp_path).put_bytes("key", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o640
