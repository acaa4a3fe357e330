"""Every kind of damage is found and named, in every file."""

import json
from pathlib import Path
from typing import Any

import pytest

from ffsplit.errors import ConfigError
from ffsplit.store.pull import verify
from ffsplit.store.store import Store

from .attempts import ATTEMPT, FILES, RUN_KEY, publish, write_attempt

PREFIX = f"{RUN_KEY}/{ATTEMPT}"


def rewrite_manifest(directory: Path, change: dict[str, Any]) -> None:
    fields = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**fields, **change}))


def test_a_whole_artifact(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    for uri in (store_uri, f"{store_uri}/{RUN_KEY}", f"{store_uri}/{PREFIX}", str(tmp_path / "attempt")):
        report = verify(uri)
        assert report.ok and report.problems == ()
        assert report.num_files == len(FILES)
        assert report.total_bytes == sum(map(len, FILES.values()))
    assert verify(store_uri).location == f"{store_uri}/{PREFIX}"


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_named(store: Store, store_uri: str, tmp_path: Path, name: str) -> None:
    publish(store, tmp_path / "attempt")
    data = bytearray(FILES[name])
    data[len(data) // 2] ^= 1
    store.put_bytes(f"{PREFIX}/{name}", bytes(data))
    report = verify(store_uri)
    assert not report.ok
    assert len(report.problems) == 1 and report.problems[0].startswith(f"{name}: differs")


def test_all_damage_is_named_at_once(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    store.put_bytes(f"{PREFIX}/config.json", b"{]")
    store.put_bytes(f"{PREFIX}/nested/deep/notes.txt", b"cut")
    store.delete(f"{PREFIX}/model.safetensors")
    store.put_bytes(f"{PREFIX}/nested/extra.bin", b"x")
    store.put_bytes(f"{PREFIX}/pickle.bin", b"x")
    names = [problem.partition(": ")[::2] for problem in verify(store_uri).problems]
    assert [(name, said.split(" (")[0]) for name, said in names] == [
        ("config.json", "differs"),
        ("model.safetensors", "is missing"),
        ("nested/deep/notes.txt", "has 3 bytes instead of 6"),
        ("nested/extra.bin", "is not listed in manifest.json"),
        ("pickle.bin", "is not listed in manifest.json"),
    ]


def test_what_the_hub_puts_beside_an_artifact_is_accepted(tmp_path: Path) -> None:
    """An artifact that was uploaded and downloaded again; anything else is still named."""
    write_attempt(tmp_path)
    beside = [".gitattributes", ".cache/huggingface/.gitignore", ".cache/huggingface/download/a.lock"]
    for name in beside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert verify(str(tmp_path)).ok
    others = [".cache/other", "nested/.gitattributes", ".gitattributes.sh", ".cache/huggingface2/x"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    problems = verify(str(tmp_path)).problems
    assert problems == tuple(f"{name}: is not listed in manifest.json" for name in sorted(others))


def test_a_manifest_other_than_the_committed(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    rewrite_manifest(tmp_path / "attempt", {"plain": False})
    store.put_file(f"{PREFIX}/manifest.json", tmp_path / "attempt" / "manifest.json")
    for uri in (store_uri, f"{store_uri}/{PREFIX}"):
        assert verify(uri).problems == ("manifest.json: is not the one that was committed",)
    store.delete(f"{PREFIX}/manifest.json")
    assert verify(store_uri).problems == ("manifest.json: is missing",)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../secret", "a\\b", "a/../b", "a\nb"])
def test_an_unsafe_path_is_named_and_never_read(tmp_path: Path, path: str) -> None:
    directory = write_attempt(tmp_path / "a" / "b")
    (tmp_path / "secret").write_text("secret")
    rewrite_manifest(directory, {"files": [{"path": path, "size_bytes": 6, "sha256": "0" * 64}]})
    report = verify(str(directory))
    assert report.total_bytes == 0 and len(report.problems) == 1
    assert repr(path) in report.problems[0] and "is not a plain relative path" in report.problems[0]


def test_symbolic_links_are_named_and_never_read(tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt")
    (directory / "config.json").rename(tmp_path / "outside.json")
    (directory / "config.json").symlink_to(tmp_path / "outside.json")
    (directory / "nested").rename(tmp_path / "outside")
    (directory / "nested").symlink_to(tmp_path / "outside")
    problems = verify(str(directory)).problems
    assert problems[0].startswith("config.json: ") and "is a symbolic link" in problems[0]
    assert problems[1:] == ("nested: is not listed in manifest.json",)
    (directory / "manifest.json").rename(tmp_path / "outside.json")
    (directory / "manifest.json").symlink_to(tmp_path / "outside.json")
    (problem,) = verify(str(directory)).problems
    assert problem.startswith("manifest.json: ") and problem.endswith(
        "symbolic link, which a store must not contain: put the file there"
    )


def test_a_manifest_that_lists_twice_or_itself(tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt")
    files = json.loads((directory / "manifest.json").read_text())["files"]
    itself = {"path": "manifest.json", "size_bytes": 1, "sha256": "0" * 64}
    rewrite_manifest(directory, {"files": [*files, files[0], itself]})
    problems = verify(str(directory)).problems
    assert "config.json: is listed 2 times" in problems
    assert "manifest.json: lists itself" in problems


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not a JSON object"), ('{"schema_version": 9}', "upgrade ffsplit")]
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    directory = write_attempt(tmp_path / "attempt")
    (directory / "manifest.json").write_text(text)
    report = verify(str(directory))
    assert not report.ok and said in report.problems[0]
    assert report.problems[0].startswith("manifest")


def test_what_is_no_artifact_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no artifact"):
        verify(str(tmp_path))
