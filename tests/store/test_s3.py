"""What is special about S3: replies that are lost, conflicts, broken connections, refusals, settings."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, HTTPClientError, InvalidRetryModeError, ResponseStreamingError

from ffsplit.errors import ConfigError, StoreError
from ffsplit.store import s3 as s3_module
from ffsplit.store import s3_client
from ffsplit.store.s3 import S3Store
from ffsplit.store.s3_client import end_of_range, explain
from ffsplit.store.store import MissingKey, backoff_s, open_store
from tests.s3.fault_proxy import Fault, FaultProxy

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr(s3_module, "backoff_s", lambda attempt: 0.0)
    opened = open_store(s3_uri)
    assert isinstance(opened, S3Store)
    return opened


def refusal(code: str, status: int) -> ClientError:
    reply: Any = {
        "Error": {"Code": code, "Message": "said\nthe server."},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(reply, "PutObject")


def before_put(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, act: Callable[..., None]
) -> list[dict[str, Any]]:
    """Run something before each put_object of a store, and record the calls."""
    put, calls = store._client.put_object, []

    def spy(**arguments: Any) -> Any:
        calls.append(arguments)
        act(put, arguments)
        return put(**arguments)

    monkeypatch.setattr(store._client, "put_object", spy)
    return calls


def test_a_lost_reply_that_was_retried_counts_as_success(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_put(
        store, monkeypatch, lambda put, arguments: put(**arguments)
    )  # landed, then sent again: a real 412
    assert store.put_if_absent("commit.json", b"mine")


def test_anothers_write_in_between_is_a_loss(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before_put(store, monkeypatch, lambda put, arguments: put(**arguments | {"Body": b"theirs"}))
    assert not store.put_if_absent("commit.json", b"mine")
    assert store.get_bytes("commit.json") == b"theirs"


def test_a_conflict_is_retried(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def conflict_twice(put: object, arguments: object) -> None:
        if len(calls) < 3:
            raise refusal("ConditionalRequestConflict", 409)

    calls = before_put(store, monkeypatch, conflict_twice)
    assert store.put_if_absent("commit.json", b"mine")
    assert len(calls) == 3 and all(call["IfNoneMatch"] == "*" for call in calls)


def test_an_endless_conflict_is_an_error(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def conflict(put: object, arguments: object) -> None:
        raise refusal("ConditionalRequestConflict", 409)

    calls = before_put(store, monkeypatch, conflict)
    with pytest.raises(StoreError, match="ConditionalRequestConflict"):
        store.put_if_absent("commit.json", b"mine")
    assert len(calls) == 5


def test_a_key_that_comes_and_goes_is_an_error(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """There when it is to be created, gone when it is read."""

    def exists(put: object, arguments: object) -> None:
        raise refusal("PreconditionFailed", 412)

    calls = before_put(store, monkeypatch, exists)
    with pytest.raises(StoreError, match=r"commit\.json: it kept appearing and disappearing: try again"):
        store.put_if_absent("commit.json", b"mine")
    assert len(calls) == 5


def test_an_outage_during_the_check_is_no_mistake_of_the_users(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(put: object, arguments: dict[str, Any]) -> None:
        if "ContentMD5" in arguments:
            raise refusal("SlowDown", 503)

    before_put(store, monkeypatch, fail)
    with pytest.raises(StoreError, match="SlowDown") as caught:
        store.check_writable()
    assert type(caught.value) is StoreError and list(store.list("")) == []


def test_a_server_without_conditional_writes_is_refused(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_put(store, monkeypatch, lambda put, arguments: arguments.pop("IfNoneMatch", None))
    with pytest.raises(ConfigError, match="ignores If-None-Match"):
        store.check_writable()
    assert list(store.list("")) == []


def break_once(body: Any, after_bytes: int) -> Iterator[bytes]:
    if after_bytes:
        yield body.read(after_bytes)
    raise ResponseStreamingError(error="connection broken")


def test_a_broken_connection_is_taken_up_where_it_broke(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 8000
    store.put_bytes("key", data)
    get, calls = store._client.get_object, []

    def breaking(**arguments: Any) -> Any:
        calls.append(arguments)
        reply = get(**arguments)
        if len(calls) <= 2:
            body = reply["Body"]
            monkeypatch.setattr(body, "iter_chunks", lambda size: break_once(body, 300_001))
        return reply

    monkeypatch.setattr(store._client, "get_object", breaking)
    assert b"".join(store.open_stream("key")) == data
    assert [call.get("Range") for call in calls] == [
        "bytes=0-",
        "bytes=300001-2047999",
        "bytes=600002-2047999",
    ]


def breaking_off(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, *, after_bytes: int, **headers: str
) -> list[dict[str, Any]]:
    """Let every body break off after some bytes, and record the requests."""
    get, calls = store._client.get_object, []

    def breaking(**arguments: Any) -> Any:
        calls.append(arguments.copy())
        arguments.pop("IfMatch", None)  # of an ETag that is made up
        reply = get(**arguments) | headers
        body = reply["Body"]
        monkeypatch.setattr(body, "iter_chunks", lambda size: break_once(body, after_bytes))
        return reply

    monkeypatch.setattr(store._client, "get_object", breaking)
    return calls


def test_a_connection_that_breaks_after_the_last_byte_broke_nothing(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("key", b"whole")
    calls = breaking_off(store, monkeypatch, after_bytes=5)
    assert b"".join(store.open_stream("key")) == b"whole" and len(calls) == 1


@pytest.mark.parametrize(("etag", "is_bound"), [('"0123"', True), ('"01', False)])
def test_a_connection_that_brings_nothing_is_given_up(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, etag: str, is_bound: bool
) -> None:
    """What is asked for again must be the same object, where its ETag came whole."""
    store.put_bytes("key", b"whole")
    calls = breaking_off(store, monkeypatch, after_bytes=0, ETag=etag)
    with pytest.raises(StoreError, match=f"cannot read {store.uri}/key: .*connection broken"):
        store.get_bytes("key")
    assert [call.get("IfMatch") for call in calls] == [None, *[etag if is_bound else None] * 4]


@pytest.mark.parametrize(
    ("status", "start", "content_range", "end"),
    [
        (200, 0, "", 5),
        (206, 0, "bytes 0-4/9", 5),
        (206, 3, "bytes 3-7/9", 8),
        (206, 3, "bytes 3-8/9", None),
        (206, 3, "bytes 0-4/9", None),
        (206, 3, "bytes 3-", None),
        (200, 3, "", None),
    ],
)
def test_headers_that_contradict_each_other_are_not_believed(
    status: int, start: int, content_range: str, end: int | None
) -> None:
    reply = {
        "ContentLength": 5,
        "ResponseMetadata": {"HTTPStatusCode": status},
        "ContentRange": content_range,
    }
    if end is not None:
        assert end_of_range(reply, start=start) == end
        return
    with pytest.raises(ResponseStreamingError, match="the headers of the reply are incomplete"):
        end_of_range(reply, start=start)


def test_waits_double_and_are_not_all_alike() -> None:
    for attempt in range(5):
        waits = {backoff_s(attempt) for _ in range(20)}
        assert len(waits) > 1 and all(0.05 * 2**attempt <= wait <= 0.1 * 2**attempt for wait in waits)


@pytest.fixture
def proxy(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the server and the stores that are opened from here on, which do not wait between attempts."""
    monkeypatch.setattr(s3_client, "backoff_s", lambda attempt: 0.0)
    made = FaultProxy(int(os.environ["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{made.port}")
    yield made
    made.close()


@pytest.mark.parametrize("times", [2, 10**6])
def test_a_listing_whose_reply_broke_off_is_no_empty_store(
    s3_uri: str, proxy: FaultProxy, times: int
) -> None:
    store = open_store(s3_uri)
    store.put_bytes("key", b"x")
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    proxy.faults.append(Fault("refused", times, re.compile(rb"GET .*list-type=2").match, reply=cut))
    if times == 2:
        assert list(store.list("")) == ["key"]
        return
    with pytest.raises(StoreError, match="the reply to ListObjectsV2 is incomplete"):
        list(store.list(""))
    assert proxy.faults[0].struck == s3_client.MAX_ATTEMPTS


@pytest.mark.parametrize("times", [2, 10**6])
def test_a_404_that_does_not_say_what_is_missing_is_asked_again(
    s3_uri: str, proxy: FaultProxy, times: int
) -> None:
    store = open_store(s3_uri)
    store.put_bytes("key", b"x")
    bare = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    proxy.faults.append(Fault("refused", times, re.compile(rb"GET .*/key").match, reply=bare))
    if times == 2:
        assert store.get_bytes("key") == b"x"
        return
    with pytest.raises(StoreError, match="404") as caught:
        store.get_bytes("key")
    assert type(caught.value) is StoreError and proxy.faults[0].struck == s3_client.MAX_ATTEMPTS


def test_an_empty_object_exists(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon refuses the first byte of it, as of any range past the end."""

    def refuse(**_: Any) -> None:
        raise refusal("InvalidRange", 416)

    monkeypatch.setattr(store._client, "get_object", refuse)
    assert store.exists("empty") and store.get_bytes("empty") == b""


def test_ranges_are_exact_and_end_with_the_object(store: S3Store) -> None:
    data = bytes(range(256))
    store.put_bytes("key", data)
    assert b"".join(store.open_stream("key", start=3, size_bytes=5)) == data[3:8]
    assert b"".join(store.open_stream("key", start=250)) == data[250:]
    assert b"".join(store.open_stream("key", start=250, size_bytes=50)) == data[250:]
    assert b"".join(store.open_stream("key", start=300, size_bytes=5)) == b""
    assert b"".join(store.open_stream("key", start=3, size_bytes=0)) == b""


def test_a_failed_download_leaves_nothing(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_midway(bucket: str, key: str, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise ResponseStreamingError(error="connection broken")

    monkeypatch.setattr(store._client, "download_file", fail_midway)
    with pytest.raises(StoreError, match="connection broken"):
        store.fetch("a/key", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_upload_that_lost_bytes_is_noticed(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"whole")
    monkeypatch.setattr(
        store._client, "upload_file", lambda path, bucket, key, **_: store._put("key", b"who")
    )
    with pytest.raises(StoreError, match="has 3 of the 5 bytes"):
        store.put_file("key", tmp_path / "source")


def test_no_such_bucket(s3_uri: str) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot write to s3://nowhere/x: .*NoSuchBucket.*create the bucket"
    ):
        open_store("s3://nowhere/x").check_writable()


def test_no_credentials(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store(s3_uri).check_writable()


def test_an_unreachable_endpoint(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = open_store(s3_uri)
    with pytest.raises(ConfigError, match="check the network, AWS_ENDPOINT_URL_S3") as caught:
        store.check_writable()
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        store.get_bytes("key")


def test_settings_reach_the_client(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFSPLIT_S3_PATH_STYLE", "1")
    monkeypatch.setenv("FFSPLIT_S3_CHECKSUM", "when_required")
    monkeypatch.setenv("FFSPLIT_S3_SSE_KMS_KEY_ID", "key-1")
    store = open_store(s3_uri)
    assert isinstance(store, S3Store)
    config: Any = store._client.meta.config
    assert config.s3["addressing_style"] == "path"
    assert config.request_checksum_calculation == config.response_checksum_validation == "when_required"
    (tmp_path / "file").write_bytes(b"x")
    store.put_file("file", tmp_path / "file")
    store.put_bytes("bytes", b"x")
    for key in ("file", "bytes"):
        head = store._client.head_object(Bucket=store._bucket, Key=store._name(key))
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-1")


@pytest.mark.parametrize(
    ("code", "status", "kind", "mend"),
    [
        ("AccessDenied", 403, ConfigError, "policy must allow s3:GetObject"),
        ("NoSuchBucket", 404, ConfigError, "create the bucket"),
        ("ExpiredToken", 400, ConfigError, "check AWS_ACCESS_KEY_ID"),
        ("PermanentRedirect", 301, ConfigError, "set AWS_REGION"),
        ("NoSuchKey", 404, MissingKey, ""),
        ("SlowDown", 503, StoreError, ""),
    ],
)
def test_refusals_are_one_line_with_the_mend(
    code: str, status: int, kind: type[Exception], mend: str
) -> None:
    error = explain(refusal(code, status), action="write s3://b/k")
    assert type(error) is kind
    assert str(error).startswith(f"cannot write s3://b/k: said the server. ({code})")
    assert mend in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            HTTPClientError(error=ValueError("Invalid header value b'hunter2\\n'")),
            ConfigError,
            "check the credentials and AWS_SESSION_TOKEN: one has a character not allowed in HTTP headers",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "/a/b"),
            StoreError,
            "/a/b No such file or directory",
        ),
        (
            InvalidRetryModeError(provided_retry_mode="x", valid_modes=[]),
            StoreError,
            "Invalid value provided",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_on_this_side_is_one_line(error: Exception, kind: type[Exception], said: str) -> None:
    explained = explain(error, action="write s3://b/k")
    assert type(explained) is kind and str(explained).startswith(f"cannot write s3://b/k: {said}")
    assert "hunter2" not in str(explained) and "\n" not in str(explained)


def test_a_server_that_gives_no_message() -> None:
    error = refusal("NoSuchKey", 404)
    error.response["Error"]["Message"] = None  # type: ignore[typeddict-item]
    assert str(explain(error, action="read s3://b/k")) == "cannot read s3://b/k: refused (NoSuchKey)"


def test_a_refused_upload_is_not_hidden_by_the_transfer_manager(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(store, "_bucket", "nowhere")
    with pytest.raises(ConfigError, match="create the bucket"):
        store.put_file("file", tmp_path / "file")


@pytest.mark.parametrize(
    ("key", "content_type"),
    [("run/report.html", "text/html; charset=utf-8"), ("index.json", "application/json")],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_pages_say_that_they_are_pages(
    store: S3Store, tmp_path: Path, key: str, content_type: str, as_file: bool
) -> None:
    (path := tmp_path / "body").write_bytes(b"{}")
    if as_file:
        store.put_file(key, path)
    else:
        store.put_bytes(key, b"{}")
    stored = store._client.head_object(Bucket=store._bucket, Key=store._name(key))
    assert stored["ContentType"] == content_type
