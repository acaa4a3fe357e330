"""Links: an artifact for those without credentials, by plain HTTP, until they expire."""

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ffsplit.artifacts.links import has_expired, share
from ffsplit.artifacts.pull import pull
from ffsplit.artifacts.retention import collect, plan
from ffsplit.artifacts.stores import open_store
from ffsplit.cli import main
from ffsplit.errors import ArtifactError, ConfigError, StoreError

from .attempts import ATTEMPT, RUN_KEY, publish
from .test_locate import cache, is_whole

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
    with pytest.raises(ArtifactError, match=r"model\.safetensors has another sha256") as caught:
        pull(link, tmp_path / "copy")
    assert "Signature" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_links_that_are_none(s3_uri: str, s3_endpoint: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    publish(store, tmp_path / "attempt")
    no_share = store.presign("latest.json", expires_s=60)
    for link, error, said in (
        (no_share, ConfigError, "is no share"),
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
    with pytest.raises(ConfigError, match="is no share"):
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
    assert "only what is in s3://" in capsys.readouterr().err
    publish(open_store(s3_uri), tmp_path / "attempt")
    for wrong in ("8d", "0s", "soon"):
        assert main(["share", s3_uri, "--expires", wrong]) == 2
        assert "--expires" in capsys.readouterr().err
