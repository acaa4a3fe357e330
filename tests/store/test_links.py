"""Links: an artifact for those without credentials, by plain HTTP, until they expire."""

import json
import os
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.errors import ArtifactError, ConfigError, StoreError
from ffsplit.store import links
from ffsplit.store.gc import collect, plan
from ffsplit.store.links import LinkedFiles, has_expired, share
from ffsplit.store.pull import pull
from ffsplit.store.schema import NewerSchema
from ffsplit.store.store import MissingKey, open_store
from tests.s3.fault_proxy import Fault, FaultProxy

from .attempts import ATTEMPT, FILES, RUN_KEY, publish, write_attempt
from .test_artifact import cache, is_whole

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]
HOUR = timedelta(hours=1)
SETTINGS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3")


def test_pulled_without_credentials(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(open_store(s3_uri), tmp_path / "attempt")
    assert main(["share", s3_uri, "--expires", "30m"]) == 0
    link = capsys.readouterr().out.strip()
    for name in SETTINGS:
        monkeypatch.delenv(name)
    assert is_whole(pull(link, tmp_path / "copy")) and is_whole(pull(link))
    with pytest.raises(ConfigError):
        pull(s3_uri, tmp_path / "other")


def test_what_is_behind_a_link_is_verified(s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    link = share(s3_uri, expires=HOUR)
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/model.safetensors", b"Weights" * 1000)
    with pytest.raises(ArtifactError, match=r"model\.safetensors does not match its sha256") as caught:
        pull(link, tmp_path / "copy")
    assert "Signature" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


@pytest.mark.slow
def test_links_that_are_none(s3_uri: str, s3_endpoint: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    no_share = store.presign("latest.json", expires_s=60)
    for link, error, said in (
        (no_share, ConfigError, "is not a share link"),
        (f"{s3_endpoint}/runs/nothing/here", StoreError, "does not exist"),
        ("http://127.0.0.1:9/share.json?secret", StoreError, "check the network"),
    ):
        with pytest.raises(error, match=said) as caught:
            pull(str(link), tmp_path / "copy")
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("change", [{"../x": "http://h/x"}, {"x": "file:///etc/passwd"}, {"x": "s3://b/k"}])
def test_a_share_that_reaches_elsewhere_is_refused(
    s3_uri: str, tmp_path: Path, change: dict[str, str]
) -> None:
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    share(s3_uri, expires=HOUR)
    (key,) = (key for key in store.list(".shares"))
    record = json.loads(store.get_bytes(key))
    record["files"] |= change
    store.put_bytes(key, json.dumps(record).encode())
    with pytest.raises(ConfigError, match="is not a share link"):
        pull(str(store.presign(key, expires_s=60)), tmp_path / "copy")


def test_expired_shares_are_collected(s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    share(s3_uri, expires=HOUR)
    store.put_bytes(".shares/20200101T000000Z-0123456789abcdef/share.json", b"{}")
    collect(store, plan(store, keep_last=1))
    assert len(list(store.list(".shares"))) == 1
    now = datetime.now(timezone.utc)
    assert has_expired("20200101T000000Z-0", now)
    assert not has_expired("29990101T000000Z-0", now) and not has_expired("notes", now)


def test_what_cannot_be_shared(s3_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(open_store(str(tmp_path / "store")), tmp_path / "attempt")
    assert main(["share", str(tmp_path / "store")]) == 2
    assert "only artifacts in s3://" in capsys.readouterr().err
    publish(open_store(s3_uri), tmp_path / "attempt")
    for wrong in ("8d", "0s", "soon"):
        assert main(["share", s3_uri, "--expires", wrong]) == 2
        assert "--expires" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["9.0", "1.0"])
def test_a_share_that_cannot_be_read_here(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """One of a later version, which is told apart from what is no share, and one that is too large."""
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    share(s3_uri, expires=HOUR)
    (key,) = (key for key in store.list(".shares"))
    data = json.dumps(json.loads(store.get_bytes(key)) | {"schema_version": version}).encode()
    store.put_bytes(key, data)
    error, said = NewerSchema, "upgrade ffsplit"
    if version == "1.0":
        monkeypatch.setattr(links, "MAX_SHARE_BYTES", len(data) - 1)
        error, said = ConfigError, "is not a share link"  # type: ignore[assignment]
    with pytest.raises(error, match=said):
        pull(str(store.presign(key, expires_s=60)), tmp_path / "copy")


def test_a_link_to_another_artifact_is_refused(s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    link = share(s3_uri, expires=HOUR)
    write_attempt(tmp_path / "other", attempt="ba9876543210")
    store.put_file(f"{RUN_KEY}/{ATTEMPT}/manifest.json", tmp_path / "other" / "manifest.json")
    with pytest.raises(ArtifactError, match=r"its manifest\.json belongs to another artifact"):
        pull(link, tmp_path / "copy")


@pytest.fixture
def proxied(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LinkedFiles, FaultProxy]]:
    """The files of a share, whose links go through a proxy."""
    monkeypatch.setattr(links, "backoff_s", lambda attempt: 0.0)
    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    publish(open_store(s3_uri), tmp_path / "attempt")
    yield LinkedFiles(share(s3_uri, expires=HOUR)), proxy
    proxy.close()


def read(files: LinkedFiles, **part: int) -> bytes:
    return b"".join(files.open_stream("model.safetensors", **part))


WEIGHTS = FILES["model.safetensors"]


def test_ranges_of_a_linked_file_end_with_it(proxied: tuple[LinkedFiles, FaultProxy]) -> None:
    files, _ = proxied
    assert read(files, start=3, size_bytes=5) == WEIGHTS[3:8]
    assert read(files, start=6998, size_bytes=50) == WEIGHTS[-2:]
    assert read(files, start=7000, size_bytes=5) == read(files, start=3, size_bytes=0) == b""
    with pytest.raises(MissingKey, match=r"does not list model\.bin"):
        list(files.open_stream("model.bin"))


@pytest.mark.parametrize("part", [{}, {"start": 10, "size_bytes": 6000}], ids=str)
def test_a_linked_file_is_taken_up_where_it_broke_off(
    proxied: tuple[LinkedFiles, FaultProxy], monkeypatch: pytest.MonkeyPatch, part: dict[str, int]
) -> None:
    """However often, as long as some bytes come each time."""
    files, proxy = proxied
    monkeypatch.setattr(links, "CHUNK_BYTES", 100)
    proxy.faults.append(Fault("cut", links.MAX_ATTEMPTS + 1, after_bytes=1000))
    assert read(files, **part) == (WEIGHTS[10:6010] if part else WEIGHTS)
    assert proxy.faults[0].struck == links.MAX_ATTEMPTS + 1


@pytest.mark.parametrize("after_bytes", [20, 100, 600], ids=["status", "headers", "body"])
def test_a_linked_file_that_breaks_off_again_and_again_is_an_error(
    proxied: tuple[LinkedFiles, FaultProxy], after_bytes: int
) -> None:
    """And never a shorter file, or an empty one, not even where only headers came."""
    files, proxy = proxied
    proxy.faults.append(Fault("cut", 10**6, after_bytes=after_bytes))
    with pytest.raises(StoreError, match=r"cannot read .*/model\.safetensors: ") as caught:
        read(files)
    assert "Signature" not in str(caught.value)
    proxy.faults.clear()
    assert read(files) == WEIGHTS


REPLIES: dict[str, tuple[type[Exception], str]] = {
    "403 Forbidden": (ConfigError, r"is not accessible or has expired: ask for a new link"),
    "410 Gone": (MissingKey, "does not exist"),
    "409 Conflict": (StoreError, "HTTP status 409"),
    "200 OK": (StoreError, "cannot be read in parts"),
}


@pytest.mark.parametrize("status", REPLIES)
def test_what_a_server_of_links_refuses_is_one_line(
    proxied: tuple[LinkedFiles, FaultProxy], status: str
) -> None:
    files, proxy = proxied
    error, said = REPLIES[status]
    reply = f"HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    proxy.faults.append(Fault("refused", 1, reply=reply.encode()))
    with pytest.raises(error, match=said) as caught:
        read(files, start=10)
    assert type(caught.value) is error and "Signature" not in str(caught.value)
    assert read(files, start=10) == WEIGHTS[10:]
