"""Pulling: in parts, taken up where it broke, whole or not at all, and the commands around it."""

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli import main
from ffsplit.errors import ArtifactError, ConfigError, RunError, StoreError
from ffsplit.store import transfer
from ffsplit.store.artifact import locate
from ffsplit.store.entries import FileEntry
from ffsplit.store.local import LocalStore
from ffsplit.store.pull import download, materialize, pull, verify
from ffsplit.store.store import Store

from .attempts import ATTEMPT, FILES, RUN_KEY, make_manifest, publish, write_attempt
from .test_artifact import cache, is_whole

__all__ = ["cache"]
pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", 1000)


class Breaking:
    """A store that fails after some reads, and counts them by key."""

    def __init__(self, store: Store, *, after: int) -> None:
        self._store, self.left, self.read = store, after, list[tuple[str, int]]()
        self.uri = store.uri

    def open_stream(self, key: str, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
        if self.left == 0:
            raise StoreError("the line is cut")
        self.left -= 1
        self.read.append((key, start))
        yield from self._store.open_stream(key, start=start, size_bytes=size_bytes)


def through(uri: str, *, after: int) -> tuple[Any, Breaking]:
    location = locate(uri)
    breaking = Breaking(location.store, after=after)
    return type(location)(**{**vars(location), "store": breaking}), breaking


def test_a_broken_pull_is_taken_up(
    store: Store, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "NUM_CONNECTIONS", 1)
    publish(store, tmp_path / "attempt")
    location, first = through(store_uri, after=5)
    with pytest.raises(StoreError, match="cut"):
        download(location, directory=tmp_path / "here" / "copy")
    assert not (tmp_path / "here" / "copy").exists()
    location, second = through(store_uri, after=-1)
    download(location, directory=tmp_path / "here" / "copy")
    assert is_whole(tmp_path / "here" / "copy")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["copy"]
    parts = [read for read in second.read if not read[0].endswith("manifest.json")]
    assert parts and not {read for read in first.read if "manifest" not in read[0]} & set(parts)


@pytest.mark.parametrize("damage", ["part", "journal", "shorter", "gone", "link"])
def test_what_an_earlier_pull_left_is_not_trusted(
    store: Store, store_uri: str, tmp_path: Path, damage: str
) -> None:
    publish(store, tmp_path / "attempt")
    location, _ = through(store_uri, after=5)
    with pytest.raises(StoreError, match="cut"):
        download(location, directory=tmp_path / "copy")
    (staging,) = tmp_path.glob(".copy.*.partial")
    weights = staging / "artifact" / "model.safetensors"
    if damage == "part":
        weights.write_bytes(b"\0" * weights.stat().st_size)
    elif damage == "journal":
        (staging / "journal").write_text("".join(f"{a} {b}\n" for a in range(4) for b in range(9)) + "\xff x")
    elif damage == "shorter":
        weights.write_bytes(b"")
    else:
        weights.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_bytes(b"\0" * 7000)
        if damage == "link":
            weights.symlink_to(tmp_path / "elsewhere")
    assert pull(store_uri, tmp_path / "copy") == tmp_path / "copy"
    assert is_whole(tmp_path / "copy")
    assert damage != "link" or (tmp_path / "elsewhere").read_bytes() == b"\0" * 7000


def test_a_file_that_is_shorter_or_gone_is_named(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/model.safetensors", b"weights" * 500)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is shorter than its 7,000 bytes"):
        pull(store_uri, tmp_path / "copy")
    store.delete(f"{RUN_KEY}/{ATTEMPT}/model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        pull(store_uri, tmp_path / "copy")
    assert not list(tmp_path.glob("*copy*"))


def test_a_longer_file_gives_the_listed_bytes(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/config.json", b"{}" + b" " * 10_000)
    pull(store_uri, tmp_path / "copy")
    assert is_whole(tmp_path / "copy")


def at(position: int, files: dict[str, bytes]) -> tuple[str, int]:
    """Which file a position in all of them falls into, and where in it."""
    for name, data in files.items():
        if position < len(data):
            return name, position
        position -= len(data)
    raise AssertionError


def test_any_of_200_flipped_bytes_is_refused_and_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    directory = write_attempt(tmp_path / "attempt")
    publish(store, tmp_path / "attempt")
    whole = {name: (directory / name).read_bytes() for name in (*FILES, "manifest.json")}
    generator, total = random.Random(0), sum(map(len, whole.values()))
    for position in generator.sample(range(total), 200):
        name, offset = at(position, whole)
        data = whole[name]
        flipped = bytearray(data)
        flipped[offset] ^= 1 << generator.randrange(8)
        store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/{name}", bytes(flipped))
        with pytest.raises(ArtifactError, match=f"{name} (does not match its sha256|is not)"):
            pull(store.uri, tmp_path / "copy")
        assert not list(tmp_path.glob("*copy*"))
        assert not verify(store.uri).ok
        store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/{name}", data)
    assert verify(store.uri).ok


@pytest.mark.parametrize("names", [("a", "A"), ("a", "a"), ("Manifest.json",), ("é", "e\u0301")], ids=str)
def test_names_that_could_be_one_file_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    directory = write_attempt(tmp_path / "attempt", files={"a": b""})
    entry = {"size_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    manifest = make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).model_dump()
    manifest["files"] = [entry | {"path": name} for name in names]
    text = type(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT)).model_validate(manifest).to_json()
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="listed twice"):
        pull(str(directory), tmp_path / "copy")


def test_no_room_is_said_before_the_first_byte(tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt", files={"a": b""})
    text = (directory / "manifest.json").read_text().replace('"size_bytes": 0', '"size_bytes": 1' + "0" * 17)
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=r"more bytes and .* are free"):
        pull(str(directory), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["attempt"]


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, tmp_path / "attempt")

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(RunError, match=r"cannot write .*/copy: No space left on device"):
        pull(store.uri, tmp_path / "copy")
    assert not list(tmp_path.glob("*copy*"))


def test_what_is_on_its_way_is_given_up_when_another_part_fails(tmp_path: Path) -> None:
    """It is not waited for to its end, and counts as not arrived."""
    begun, sent = threading.Event(), list[int]()

    class Source:
        uri = "source"

        def open_stream(self, key: str, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
            if key == "fails":
                begun.wait(30)
                raise StoreError("the line is cut")
            for number in range(3):
                sent.append(number)
                yield b"x"
                begun.set()
                assert copying._stop.wait(30)

    entries = [FileEntry(path=name, size_bytes=3, sha256="0" * 64) for name in ("slow", "fails")]
    copying = transfer.Transfer(Source(), prefix="", entries=entries, staging=tmp_path / "staging", label="x")
    with pytest.raises(StoreError, match="cut"):
        copying.into(tmp_path / "copy")
    assert sent == [0, 1] and (tmp_path / "staging" / "journal").read_text() == ""


def test_a_manifest_too_large_is_not_read(tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt")
    with (directory / "manifest.json").open("r+b") as file:
        file.truncate(10**9)
    with pytest.raises(StoreError, match="is larger than"):
        pull(str(directory), tmp_path / "copy")


@pytest.mark.s3
def test_what_is_cached_is_copied_from_there(
    s3_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = locate_store(s3_uri)
    publish(store, tmp_path / "attempt")
    cached = materialize(s3_uri)
    for name in FILES:
        store.delete(f"{RUN_KEY}/{ATTEMPT}/{name}")
    pull(s3_uri, tmp_path / "copy")
    assert is_whole(tmp_path / "copy") and os.stat(cached / "config.json").st_nlink == 1
    assert main(["pull", s3_uri]) == 0
    assert capsys.readouterr().out == f"{cached}\n"


def locate_store(uri: str) -> Store:
    from ffsplit.store.store import open_store

    return open_store(uri)


@pytest.mark.subprocess
def test_the_command_and_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, tmp_path / "attempt")
    assert main(["pull", store.uri, str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'copy'}\n"
    assert main(["pull", str(tmp_path / "nowhere"), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    code = (
        "import sys; from ffsplit.cli import main; main(['pull', *sys.argv[1:]]);"
        "print(sorted({'torch', 'transformers', 'ray'} & {name.split('.')[0] for name in sys.modules}))"
    )
    run = [sys.executable, "-c", code, store.uri, str(tmp_path / "by-command")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    run = [sys.executable, str(ROOT / "jobs/retrieve.py"), store.uri, str(tmp_path / "by-job")]
    subprocess.run(run, check=True, cwd=ROOT)
    assert is_whole(tmp_path / "by-job")
    relative = [sys.executable, str(ROOT / "jobs/retrieve.py"), store.uri, "relative"]
    refused = subprocess.run(relative, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert refused.returncode == 2 and "must be absolute" in refused.stderr
