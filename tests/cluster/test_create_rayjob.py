"""create_rayjob.py, run as the CronJob's pod runs it, against an API server on loopback with TLS."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.cluster.files import KUBERNETES

SCRIPT, MANIFEST = KUBERNETES / "create_rayjob.py", KUBERNETES / "rayjob.yaml"
PATH = "/apis/ray.io/v1/namespaces/ffsplit/rayjobs"


class Api:
    """The part of a Kubernetes API server that knows RayJobs."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []
        """What is answered first, whatever is asked."""
        self.states: list[dict[str, Any]] = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
        """The statuses that are shown, one after the other; the last one stays."""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.requests.append(f"{method} {path}")
        if token != "Bearer of-the-pod":
            return 401, {"message": "Unauthorized"}
        if self.answers:
            return self.answers.pop(0)
        if method == "POST":
            job = json.loads(body)
            if any(job["metadata"]["name"] == each["metadata"]["name"] for each in self.created):
                return 409, {"message": "already exists"}
            self.created.append(job)
            return 201, job
        status = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return 200, {"status": status}


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def environment(api: Api, tmp_path: Path) -> Iterator[dict[str, str]]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder(
            issuer_name=name, subject_name=name, public_key=key.public_key(), serial_number=1
        )
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "both.pem").write_bytes(private + pem)
    account = tmp_path / "account"
    account.mkdir()
    (account / "ca.crt").write_bytes(pem)
    (account / "token").write_text("of-the-pod\n")
    (account / "namespace").write_text("ffsplit")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, reply = api.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "both.pem")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "PATH": os.environ["PATH"],
        "SERVICE_ACCOUNT": str(account),
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(server.server_port),
        "JOB_NAME": "ffsplit-zoo-29403840",
        "JOB_UID": "0f1e",
        "POLL_S": "0.05",
    }
    server.shutdown()
    server.server_close()


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(MANIFEST)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.subprocess
def test_it_creates_one_rayjob_and_waits_for_it(api: Api, environment: dict[str, str]) -> None:
    api.states = [{}, {"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Retrying"}, *api.states]
    done = run(environment)
    assert done.returncode == 0, done.stderr
    (job,) = api.created
    assert job["metadata"]["name"] == "ffsplit-zoo-29403840"
    assert job["metadata"]["namespace"] == "ffsplit"
    assert "generateName" not in job["metadata"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "ffsplit-zoo-29403840", "uid": "0f1e"}
    assert job["metadata"]["ownerReferences"] == [owner]
    assert api.requests[0] == f"POST {PATH}?fieldValidation=Strict"
    assert set(api.requests[1:]) == {f"GET {PATH}/ffsplit-zoo-29403840"}
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == [
        "created",
        "New",
        "Running",
        "Retrying",
        "Complete SUCCEEDED",
    ]


@pytest.mark.subprocess
def test_a_second_pod_makes_no_second_rayjob(api: Api, environment: dict[str, str]) -> None:
    assert run(environment).returncode == run(environment).returncode == 0
    assert len(api.created) == 1


@pytest.mark.subprocess
@pytest.mark.parametrize("state", ["Failed", "ValidationFailed"])
def test_a_batch_that_fails_fails_the_job(api: Api, environment: dict[str, str], state: str) -> None:
    api.states = [{"jobDeploymentStatus": state, "reason": "AppFailed", "message": "exit code 3"}]
    done = run(environment)
    assert done.returncode == 1
    assert f"{state} AppFailed exit code 3" in done.stdout


@pytest.mark.subprocess
@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_refused_manifest_is_not_tried_again(api: Api, environment: dict[str, str], status: int) -> None:
    api.answers = [(status, {"message": 'unknown field "spec.rayClusterSpec.authOptions"'})]
    done = run(environment)
    assert done.returncode == 2
    assert "authOptions" in done.stderr
    assert len(api.requests) == 1


@pytest.mark.subprocess
def test_an_api_that_is_away_for_a_while_is_asked_again(api: Api, environment: dict[str, str]) -> None:
    api.answers = [(503, {}), (429, {}), (500, {})]
    done = run(environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("retrying") == 3
    assert len(api.created) == 1


@pytest.mark.subprocess
def test_an_api_that_stays_away_is_given_up(api: Api, environment: dict[str, str]) -> None:
    """With an exit code of its own, after which another pod waits on."""
    api.answers = [(503, {})] * 10_000
    done = run(environment | {"GIVE_UP_S": "0.2"})
    assert done.returncode == 3
    assert "the API answered 503, for 0.2 s in total; the batch may still run" in done.stderr.splitlines()[-1]


@pytest.mark.subprocess
@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", "| true", ">&- 2>&-"])
def test_streams_that_cannot_be_written_end_nothing(environment: dict[str, str], redirection: str) -> None:
    command = f"set -o pipefail; {sys.executable} {SCRIPT} {MANIFEST} {redirection}"
    assert subprocess.run(["bash", "-c", command], env=environment, capture_output=True).returncode == 0


@pytest.mark.subprocess
def test_a_rayjob_that_goes_is_a_failure(api: Api, environment: dict[str, str]) -> None:
    api.answers = [(201, {}), (404, {"message": "not found"})]
    assert run(environment).returncode == 1


@pytest.mark.subprocess
def test_another_server_gets_no_token(api: Api, environment: dict[str, str], tmp_path: Path) -> None:
    """One that the pod's CA does not vouch for: the request never gets to it."""
    other = x509.load_pem_x509_certificate((Path(environment["SERVICE_ACCOUNT"]) / "ca.crt").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    replaced = (
        x509.CertificateBuilder(
            issuer_name=other.issuer, subject_name=other.subject, public_key=key.public_key(), serial_number=2
        )
        .not_valid_before(other.not_valid_before_utc)
        .not_valid_after(other.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (Path(environment["SERVICE_ACCOUNT"]) / "ca.crt").write_bytes(
        replaced.public_bytes(serialization.Encoding.PEM)
    )
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(MANIFEST)], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "cannot be reached" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert api.requests == []


@pytest.mark.subprocess
def test_it_goes_at_once_when_it_is_told_to(api: Api, environment: dict[str, str]) -> None:
    api.states = [{"jobDeploymentStatus": "Running"}]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(MANIFEST)],
        env=environment | {"POLL_S": "60"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "Running" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(50) == 143, "it does not sleep to the next poll"
