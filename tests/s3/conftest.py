"""Real S3 servers, started once, on loopback; `make test-s3` asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import boto3
import pytest
from botocore.config import Config

from tests.s3 import ceph_server, swift_server
from tests.s3.fault_proxy import FaultProxy
from tests.s3.loopback import CannotStart, Processes, S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Start = Callable[[], tuple[S3Server, Processes]]


def _served(start: Start) -> Iterator[S3Server]:
    if not os.environ.get("FFSPLIT_TEST_SERVERS"):
        pytest.skip("starts real servers: make test-s3")
    try:
        server, processes = start()
    except CannotStart as error:
        pytest.skip(f"cannot be started here: {error}")
    yield server
    processes.stop()


@pytest.fixture(scope="session")
def swift() -> Iterator[S3Server]:
    yield from _served(swift_server.start)


@pytest.fixture(scope="session")
def ceph() -> Iterator[S3Server]:
    yield from _served(ceph_server.start)


@pytest.fixture(params=["swift", "ceph"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each server in turn, with the environment that reaches it."""
    found: S3Server = request.getfixturevalue(request.param)
    for name in list(os.environ):
        if name.startswith(("AWS_", "FFSPLIT_S3_")):
            monkeypatch.delenv(name)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def client(server: S3Server) -> S3Client:
    """A bare client of that server."""
    made: Any = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    return made  # type: ignore[no-any-return]


@pytest.fixture
def bucket(client: S3Client) -> str:
    name = f"runs-{uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def uri(bucket: str) -> str:
    """An empty prefix of a new bucket."""
    return f"s3://{bucket}/zoo"


@pytest.fixture
def proxy(server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between this process and the server from here on: whatever opens a store goes through it."""
    made = FaultProxy(int(server.endpoint.rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{made.port}")
    yield made
    made.close()
