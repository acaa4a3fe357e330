"""What a user is told whose request Amazon refuses: one line with what to set, exit code 2, nothing written.

The replies are Amazon's, word for word, by a server of our own: those on loopback know neither regions nor
temporary credentials.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ffsplit.cli import main
from tests.small_jobs import SmallJob

from .test_artifact import cache

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache", "s3_uri")]

BODY = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message></Error>'
REFUSALS = {
    "ExpiredToken": (400, "The provided token has expired.", "check AWS_ACCESS_KEY_ID"),
    "InvalidAccessKeyId": (
        403,
        "The AWS Access Key Id you provided does not exist in our records.",
        "check AWS_ACCESS_KEY_ID",
    ),
    "AuthorizationHeaderMalformed": (
        400,
        "The authorization header is malformed; a non-empty region must be provided in the credential.",
        "set AWS_REGION to the bucket's region",
    ),
    "PermanentRedirect": (
        301,
        "The bucket you are attempting to access must be addressed using the specified endpoint.",
        "AWS_REGION",
    ),
    "AccessDenied": (403, "Access Denied", "the bucket's policy must allow s3:GetObject"),
    "NoSuchBucket": (404, "The specified bucket does not exist", "create the bucket or correct the URI"),
}


@pytest.fixture(params=[*REFUSALS, "PermanentRedirect to a region"])
def refusal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that refuses whatever it is asked in one way."""
    code, _, region = str(request.param).partition(" to ")
    status, message, _ = REFUSALS[code]
    body = BODY.format(code, message).encode()

    class Refuse(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            if region:
                self.send_header("x-amz-bucket-region", "eu-west-3")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = refuse

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("FFSPLIT_S3_PATH_STYLE", "1")
    yield code
    server.shutdown()
    server.server_close()


def test_every_command_says_what_to_set(
    refusal: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, mend = "s3://models/minilm", REFUSALS[refusal][2]
    commands = (
        ["pull", uri, str(tmp_path / "copy")],
        ["list", uri],
        ["verify", uri],
        ["share", uri],
        ["gc", uri, "--keep-last", "1"],
        ["report", uri, "--out", str(tmp_path / "report.html")],
        ["inspect", uri],
        ["compress", *small_job.arguments(uri, "--runner", "serial")],
    )
    before = set(tmp_path.rglob("*"))
    for command in commands:
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert mend in error and error.count("\n") == 1, command
    assert set(tmp_path.rglob("*")) == before
