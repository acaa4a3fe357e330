"""The stores' promises, held against real servers."""

from __future__ import annotations

import base64
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import botocore.auth
import pytest
from botocore.exceptions import ClientError

from ffsplit.cli import main
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.store.artifact import locate
from ffsplit.store.gc import collect, plan
from ffsplit.store.links import share
from ffsplit.store.pull import pull, verify
from ffsplit.store.s3 import STORE_RECORD
from ffsplit.store.store import MissingKey, open_store
from tests.s3.loopback import S3Server
from tests.store.attempts import ATTEMPT, RUN_KEY, publish
from tests.store.test_artifact import cache, is_whole

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]


def test_the_probe_tells_the_servers_apart(server: S3Server, uri: str) -> None:
    store = open_store(uri)
    guarantees = store.check_writable()
    assert store.check_writable() == guarantees
    assert list(store.list("")) == [STORE_RECORD]
    assert "md5" in guarantees.checksums
    if server.atomic_create:
        assert guarantees.conditional_put == "atomic"


def test_published_and_pulled(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    commit = publish(store, tmp_path / "attempt")
    assert verify(uri).ok and locate(uri).commit == commit
    assert is_whole(pull(uri, tmp_path / "copy")) and is_whole(pull(uri))
    assert publish(store, tmp_path / "again", attempt="ba9876543210") == commit
    assert store.list_directories(RUN_KEY) == [ATTEMPT]


def test_a_key_is_created_once(server: S3Server, uri: str) -> None:
    store = open_store(uri)
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            values = [f"{number} {writer}".encode() for writer in range(8)]
            won = list(pool.map(lambda value, key=f"key-{number}": store.put_if_absent(key, value), values))
            standing = store.get_bytes(f"key-{number}")
            assert standing in values
            if server.atomic_create:
                assert won == [value == standing for value in values]


def test_a_thousand_keys_and_more(uri: str) -> None:
    store = open_store(uri)
    keys = [f"runs/{number:04d}/x" for number in range(1030)]
    with ThreadPoolExecutor(16) as pool:
        assert len(list(pool.map(lambda key: store.put_bytes(key, b"x"), keys))) == len(keys)
    assert list(store.list("")) == keys
    assert store.list_directories("runs") == [key.split("/")[1] for key in keys]
    store.delete_prefix("runs")
    assert list(store.list("")) == []


def test_parts_and_ranges(uri: str, tmp_path: Path) -> None:
    data = hashlib.shake_128(b"seed").digest(40 << 20)
    (tmp_path / "big").write_bytes(data)
    store = open_store(uri)
    store.put_file("big", tmp_path / "big")
    assert b"".join(store.open_stream("big", start=17 << 20, size_bytes=1234)) == data[17 << 20 :][:1234]
    assert b"".join(store.open_stream("big")) == data
    assert b"".join(store.open_stream("big", start=len(data), size_bytes=5)) == b""
    with pytest.raises(MissingKey):
        store.get_bytes("bigger")


def test_a_wrong_checksum_is_refused(client: S3Client, bucket: str) -> None:
    wrong = base64.b64encode(hashlib.md5(b"other", usedforsecurity=False).digest()).decode()
    with pytest.raises(ClientError, match="BadDigest"):
        client.put_object(Bucket=bucket, Key="key", Body=b"data", ContentMD5=wrong)


def test_a_bucket_with_versions(server: S3Server, client: S3Client, bucket: str, tmp_path: Path) -> None:
    store = open_store(f"s3://{bucket}/zoo")
    store.check_writable()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    if server.name == "ceph":  # of Debian 12: in such a bucket it creates what exists
        with pytest.raises(ConfigError, match="ignores If-None-Match"):
            store.check_writable()  # whatever was found before
    else:
        store.check_writable()
    for number in range(3):
        publish(store, tmp_path / f"{number}", run_key=f"{number:016x}")
    store.put_bytes(f"{0:016x}/{ATTEMPT}/config.json", b"[]")
    with pytest.raises(FFSplitError, match=r"config\.json"):
        pull(f"{store.uri}/{0:016x}", tmp_path / "copy")
    collect(store, plan(store, keep_last=1))
    assert {key.split("/")[0] for key in store.list("")} == {
        *(f"{2:016x}", "index.json", "latest.json", ".ffsplit")
    }
    assert publish(store, tmp_path / "again", run_key=f"{0:016x}").run_key == f"{0:016x}"
    assert verify(f"{store.uri}/{0:016x}").ok


def test_uploads_that_were_never_finished(client: S3Client, bucket: str) -> None:
    store = open_store(f"s3://{bucket}/zoo")
    client.create_multipart_upload(Bucket=bucket, Key="zoo/big")
    client.create_multipart_upload(Bucket=bucket, Key="other/big")
    now = datetime.now(timezone.utc)
    assert store.remove_leftovers(now - timedelta(hours=1), dry_run=False) == 0
    assert store.remove_leftovers(now + timedelta(hours=1), dry_run=False) == 1
    assert [each["Key"] for each in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["other/big"]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "check AWS_ACCESS_KEY_ID"),
        ("AWS_ACCESS_KEY_ID", "nobody:nothing", "check AWS_ACCESS_KEY_ID"),
        ("AWS_ACCESS_KEY_ID", None, "set AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_is_not_let_in_is_one_line_and_exit_code_2(
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    value: str | None,
    said: str,
) -> None:
    publish(open_store(uri), tmp_path / "attempt")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv(setting, value) if value else monkeypatch.delenv(setting)
    if value is None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for arguments in (["pull", uri, str(tmp_path / "copy")], ["list", uri], ["verify", uri]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match=said):
        open_store(uri).check_writable()
    assert not (tmp_path / "copy").exists()


def test_who_is_not_allowed_is_told_what_to_allow(
    server: S3Server,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(open_store(uri), tmp_path / "attempt")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.stranger[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.stranger[1])
    for arguments in (["pull", uri, str(tmp_path / "copy")], ["list", uri], ["verify", uri], ["pin", uri]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "the bucket's policy must allow" in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="policy must allow"):
        open_store(uri).check_writable()
    assert not (tmp_path / "copy").exists()


def test_a_signature_that_expired_names_the_clock(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(open_store(uri), tmp_path / "attempt")
    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now() - timedelta(hours=1))
    for arguments in (["pull", uri, str(tmp_path / "copy")], ["list", uri], ["verify", uri]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "AWS_PROFILE and the clock" in error and error.count("\n") == 1
    assert not (tmp_path / "copy").exists()


def test_another_region_is_put_right(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 signs again for the region that the server names, or the server does not mind."""
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    publish(open_store(uri), tmp_path / "attempt")
    assert is_whole(pull(uri, tmp_path / "copy"))


@pytest.mark.parametrize("where", ["s3://no-such-bucket-here/zoo", "nothing", "a-run"])
def test_what_is_not_there_is_one_line_and_exit_code_2(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    target = {"nothing": f"{uri}/nothing", "a-run": f"{uri}/{RUN_KEY}"}.get(where, where)
    for arguments in (["pull", target, str(tmp_path / "copy")], ["verify", target], ["list", target]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_links_work_until_they_expire(
    client: S3Client, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(open_store(uri), tmp_path / "attempt")
    link, brief = share(uri, expires=timedelta(minutes=5)), share(uri, expires=timedelta(seconds=1))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    assert is_whole(pull(link, tmp_path / "copy"))
    time.sleep(2.1)
    with pytest.raises(ConfigError, match="ask for a new link"):
        pull(brief, tmp_path / "late")
    with pytest.raises(ConfigError, match="ask for a new link"):
        pull(link.replace("X-Amz-Signature=", "X-Amz-Signature=0"), tmp_path / "late")
