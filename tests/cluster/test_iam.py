"""The policies at work: a store used with them on a server that enforces IAM, and with less than them."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest

from ffsplit.errors import ConfigError, StoreError
from ffsplit.store.s3 import STORE_RECORD
from ffsplit.store.store import Store, open_store
from tests.cluster.test_aws import AWS

pytestmark = pytest.mark.s3
BUCKET = "example-models"
ADMIN = {"region_name": "eu-central-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}
BIG_BYTES = 17 << 20
"""More than one part."""
REFUSED = (ConfigError, StoreError)
Policy = dict[str, Any]
Become = Callable[[Policy], None]


def policy(name: str) -> Policy:
    found: Policy = json.loads((AWS / name).read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server in a process of its own: what it enforces, it enforces for all who talk to that process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/moto-api/").close()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def ask(endpoint: str, path: str, data: bytes = b"") -> None:
    request = urllib.request.Request(f"{endpoint}/moto-api/{path}", data=data, method="POST")
    request.add_header("Content-Type", "text/plain")
    urllib.request.urlopen(request).close()


def enforce(endpoint: str, *, after: str) -> None:
    """Check every request after this many for what IAM says of its user."""
    ask(endpoint, "reset-auth", after.encode())


@pytest.fixture
def become(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Become]:
    """`become(policy)`: from here on boto3 is a user with this policy and no other."""
    enforce(endpoint, after="inf")
    ask(endpoint, "reset")
    s3 = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    s3.put_object(Bucket=BUCKET, Key="originals/minilm/config.json", Body=b"{}")
    s3.create_multipart_upload(Bucket=BUCKET, Key="zoo/left-over")
    iam = boto3.client("iam", endpoint_url=endpoint, **ADMIN)

    def act(document: Policy) -> None:
        iam.create_user(UserName="ffsplit")
        iam.put_user_policy(UserName="ffsplit", PolicyName="bucket", PolicyDocument=json.dumps(document))
        key = iam.create_access_key(UserName="ffsplit")["AccessKey"]
        settings = {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_REGION": "eu-central-1",
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_MAX_ATTEMPTS": "1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "FFSPLIT_S3_SSE_KMS_KEY_ID"):
            monkeypatch.delenv(name, raising=False)
        enforce(endpoint, after="0")

    yield act
    enforce(endpoint, after="inf")


def use(store: Store, folder: Path) -> None:
    """Whatever a store can do, once."""
    assert store.check_writable() == store.check_writable()
    store.delete(STORE_RECORD)
    big = folder / "big"
    big.write_bytes(bytes(BIG_BYTES))
    store.put_file("run/big", big)
    store.put_bytes("run/small", b"small")
    assert store.put_if_absent("run/commit.json", b"mine")
    assert not store.put_if_absent("run/commit.json", b"theirs")
    assert store.get_bytes("run/small") == b"small"
    assert sum(map(len, store.open_stream("run/big", start=1, size_bytes=9))) == 9
    store.fetch("run/big", folder / "fetched")
    assert store.exists("run/small")
    assert not store.exists("run/missing")
    assert list(store.list("run")) == ["run/big", "run/commit.json", "run/small"]
    assert list(store.list_directories("")) == ["run"]
    assert store.presign("run/small", expires_s=60)
    store.delete("run/small")
    store.delete_prefix("run")
    assert store.remove_leftovers(datetime(2100, 1, 1, tzinfo=timezone.utc), dry_run=False) == 1
    assert list(store.list("")) == []


@pytest.mark.subprocess
def test_the_writers_policy_is_enough(become: Become, tmp_path: Path) -> None:
    become(policy("bucket-writer.json"))
    use(open_store(f"s3://{BUCKET}/zoo"), tmp_path)
    assert open_store(f"s3://{BUCKET}/originals").get_bytes("minilm/config.json") == b"{}"


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "action",
    [
        action
        for statement in policy("bucket-writer.json")["Statement"]
        if statement["Sid"] != "OriginalsAndTexts"
        for action in statement["Action"]
    ],
)
def test_without_any_one_action_it_is_not(become: Become, tmp_path: Path, action: str) -> None:
    less = copy.deepcopy(policy("bucket-writer.json"))
    for statement in less["Statement"]:
        if statement["Sid"] != "OriginalsAndTexts":
            statement["Action"] = [each for each in statement["Action"] if each != action]
    become(less)
    with pytest.raises(REFUSED, match=r"AccessDenied|403"):
        use(open_store(f"s3://{BUCKET}/zoo"), tmp_path)


@pytest.mark.subprocess
@pytest.mark.parametrize("prefix", ["originals", "elsewhere"])
def test_the_writer_writes_below_its_prefix_alone(become: Become, prefix: str) -> None:
    become(policy("bucket-writer.json"))
    with pytest.raises(REFUSED, match=r"AccessDenied|403"):
        open_store(f"s3://{BUCKET}/{prefix}").put_bytes("run/small", b"small")
    with pytest.raises(REFUSED, match=r"AccessDenied|403"):
        open_store(f"s3://{BUCKET}/{prefix}").delete("minilm/config.json")


@pytest.mark.subprocess
def test_the_reader_reads(become: Become, endpoint: str) -> None:
    boto3.client("s3", endpoint_url=endpoint, **ADMIN).put_object(Bucket=BUCKET, Key="zoo/a", Body=b"a")
    become(policy("bucket-reader.json"))
    store = open_store(f"s3://{BUCKET}/zoo")
    assert store.get_bytes("a") == b"a"
    assert list(store.list("")) == ["a"]
    with pytest.raises(REFUSED, match=r"AccessDenied|403"):
        store.put_bytes("b", b"b")
    with pytest.raises(REFUSED, match=r"AccessDenied|403"):
        store.delete("a")


@pytest.mark.subprocess
def test_the_server_takes_the_lifecycle_rule(endpoint: str) -> None:
    enforce(endpoint, after="inf")
    client = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
    client.create_bucket(Bucket="lifecycle", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    rules = json.loads((AWS / "lifecycle.json").read_text("utf-8"))
    client.put_bucket_lifecycle_configuration(Bucket="lifecycle", LifecycleConfiguration=rules)
    kept = client.get_bucket_lifecycle_configuration(Bucket="lifecycle")["Rules"]
    assert [rule["ID"] for rule in kept] == [rule["ID"] for rule in rules["Rules"]]
