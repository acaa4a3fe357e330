"""Every way to name an artifact, every way to misname it, and copies that are whole or do not appear."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.errors import ArtifactError, ConfigError, FFSplitError
from ffsplit.store.artifact import locate, read_manifest
from ffsplit.store.pull import download, materialize
from ffsplit.store.s3_client import make_client
from ffsplit.store.store import Store, open_store

from .attempts import ATTEMPT, FILES, RUN_KEY, publish, write_attempt

NEWER_RUN = "fedcba9876543210"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def is_whole(directory: Path) -> bool:
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    same = all((directory / name).read_bytes() == data for name, data in FILES.items())
    return same and names == {*FILES, "manifest.json"}


def test_three_ways_to_name_an_artifact(store: Store, store_uri: str, tmp_path: Path) -> None:
    old = publish(store, tmp_path / "old")
    new = publish(store, tmp_path / "new", run_key=NEWER_RUN)
    for uri, commit in [
        (store_uri, new),
        (f"{store_uri}/", new),
        (f"{store_uri}/{RUN_KEY}", old),
        (f"{store_uri}/{RUN_KEY}/", old),
        (f"{store_uri}/{RUN_KEY}/{ATTEMPT}", old),
    ]:
        location = locate(uri)
        assert location.commit == commit
        assert (location.run_key, location.attempt) == (commit.run_key, ATTEMPT)
        assert location.uri == f"{store_uri}/{commit.run_key}/{ATTEMPT}"
        assert read_manifest(location).run_key == commit.run_key
        assert is_whole(materialize(uri))


def test_an_attempt_without_a_commit_is_found_by_its_own_directory_only(
    store: Store, store_uri: str, tmp_path: Path
) -> None:
    for name, path in ((name, write_attempt(tmp_path / "a") / name) for name in (*FILES, "manifest.json")):
        store.put_file(f"{RUN_KEY}/{ATTEMPT}/{name}", path)
    location = locate(f"{store_uri}/{RUN_KEY}/{ATTEMPT}")
    assert location.commit is None and location.attempt == ATTEMPT
    assert is_whole(materialize(f"{store_uri}/{RUN_KEY}/{ATTEMPT}"))
    with pytest.raises(ConfigError, match="the run is not committed"):
        locate(f"{store_uri}/{RUN_KEY}")
    with pytest.raises(ConfigError, match="its runs are not committed"):
        locate(store_uri)


def test_a_copy_under_any_name_is_an_artifact(tmp_path: Path) -> None:
    for name in ("copy", RUN_KEY, ATTEMPT):
        directory = write_attempt(tmp_path / name)
        assert locate(str(directory)).run_key is None
        assert materialize(str(directory)) == directory


def test_a_place_that_is_named_like_a_run(tmp_path: Path) -> None:
    for root in (tmp_path / RUN_KEY, tmp_path / RUN_KEY / ATTEMPT):
        commit = publish(open_store(str(root)), tmp_path / "attempt")
        assert locate(str(root)).commit == commit


@pytest.mark.s3
def test_a_bucket_that_is_named_like_a_run(s3_uri: str, tmp_path: Path) -> None:
    client = make_client(s3_uri)
    client.create_bucket(Bucket=RUN_KEY)
    uri = f"s3://{RUN_KEY}/{ATTEMPT}"
    commit = publish(open_store(uri), tmp_path / "attempt", run_key=NEWER_RUN)
    assert locate(uri).commit == commit


def test_what_holds_no_artifact_is_one_clear_line(store: Store, store_uri: str, tmp_path: Path) -> None:
    for uri in (store_uri, f"{store_uri}/{RUN_KEY}", f"{store_uri}/{RUN_KEY}/{ATTEMPT}"):
        with pytest.raises(ConfigError, match="holds no artifact: give") as caught:
            locate(uri)
        assert str(caught.value).startswith(uri) and "\n" not in str(caught.value)
    publish(store, tmp_path / "statistics", kind="statistics")
    with pytest.raises(ConfigError, match="holds no artifact: only statistics"):
        locate(store_uri)
    assert locate(f"{store_uri}/{RUN_KEY}").commit


def test_a_file_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="holds no artifact"):
        locate(str(tmp_path / "file"))


@given(st.text(alphabet="s3:/ab~@%\\", max_size=12) | st.from_regex(r"/?[0-9a-f]{16}(/[0-9a-f]{12})?/?"))
def test_no_text_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "nothing"
    with pytest.raises(FFSplitError):
        locate(f"{root}/{text}")


def test_a_manifest_other_than_the_committed_is_refused(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    key = f"{RUN_KEY}/{ATTEMPT}/manifest.json"
    manifest = json.loads(store.get_bytes(key))
    store.put_bytes(key, json.dumps({**manifest, "plain": False}).encode())
    for uri in (store_uri, f"{store_uri}/{RUN_KEY}", f"{store_uri}/{RUN_KEY}/{ATTEMPT}"):
        with pytest.raises(ArtifactError, match=r"manifest\.json is not the one that was committed"):
            materialize(uri)
    store.delete(key)
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        materialize(store_uri)


def test_a_manifest_of_another_attempt_is_refused(tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / NEWER_RUN / ATTEMPT)
    with pytest.raises(ArtifactError, match=f"belongs to {RUN_KEY}/{ATTEMPT}"):
        materialize(str(directory))


def test_local_artifacts_are_used_in_place_after_a_glance(tmp_path: Path, cache: Path) -> None:
    directory = write_attempt(tmp_path / "copy")
    assert materialize(str(directory)) == directory
    assert not cache.exists()
    (directory / "config.json").write_bytes(b"{ }")
    with pytest.raises(ArtifactError, match=r"config\.json has 3 bytes instead of 2"):
        materialize(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        materialize(str(directory))


@pytest.mark.s3
class TestFromS3:
    @pytest.fixture(params=["s3"])
    def store_uri(self, s3_uri: str) -> str:
        return s3_uri

    def test_a_download_is_cached_by_the_manifests_digest(
        self, store: Store, store_uri: str, tmp_path: Path, cache: Path
    ) -> None:
        publish(store, tmp_path / "attempt")
        directory = materialize(store_uri)
        digest = hashlib.sha256((tmp_path / "attempt" / "manifest.json").read_bytes()).hexdigest()
        assert directory == cache / "artifacts" / digest
        assert is_whole(directory)
        for name in FILES:
            store.delete(f"{RUN_KEY}/{ATTEMPT}/{name}")
        assert materialize(store_uri) == directory
        with pytest.raises(ArtifactError, match="is missing"):
            materialize(store_uri, cache=tmp_path / "other")
        assert list((tmp_path / "other" / "artifacts").iterdir()) == []

    def test_a_damaged_cache_is_downloaded_again(self, store: Store, store_uri: str, tmp_path: Path) -> None:
        publish(store, tmp_path / "attempt")
        directory = materialize(store_uri)
        (directory / "config.json").write_bytes(b"cut off")
        assert materialize(store_uri) == directory
        assert is_whole(directory)

    def test_a_flipped_byte_never_appears(
        self, store: Store, store_uri: str, tmp_path: Path, cache: Path
    ) -> None:
        publish(store, tmp_path / "attempt")
        store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/nested/deep/notes.txt", b"Notes\n")
        with pytest.raises(ArtifactError, match=r"nested/deep/notes\.txt does not match its sha256"):
            materialize(store_uri)
        assert list((cache / "artifacts").iterdir()) == []

    def test_downloading_at_once_gives_one_directory(
        self, store: Store, store_uri: str, tmp_path: Path
    ) -> None:
        publish(store, tmp_path / "attempt")
        with ThreadPoolExecutor(4) as pool:
            directories = set(pool.map(materialize, [store_uri] * 4))
        assert len(directories) == 1 and is_whole(directories.pop())


def test_a_download_that_differs_never_appears(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/config.json", b"[]")
    with pytest.raises(ArtifactError, match=r"config\.json does not match its sha256"):
        download(locate(store_uri), directory=tmp_path / "here" / "copy")
    assert list((tmp_path / "here").iterdir()) == []


def test_download_into_a_directory_of_ones_own(store: Store, store_uri: str, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    (tmp_path / "here").mkdir()
    manifest = download(locate(store_uri), directory=tmp_path / "here")
    assert is_whole(tmp_path / "here") and manifest.run_key == RUN_KEY
    assert not list(tmp_path.glob(".here*"))
    assert download(locate(store_uri), directory=tmp_path / "here") == manifest
    (tmp_path / "here" / "config.json").write_bytes(b"[]")
    with pytest.raises(ConfigError, match=r"damaged copy \(config\.json differs\): remove it"):
        download(locate(store_uri), directory=tmp_path / "here")
    (tmp_path / "here" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        download(locate(store_uri), directory=tmp_path / "here")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="choose another directory"):
            download(locate(store_uri), directory=taken)
    assert (tmp_path / "file").read_text() == "mine"
