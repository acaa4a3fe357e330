"""No command shows or writes a credential, whatever is wrong with it: every command of the parser is run."""

from __future__ import annotations

import argparse
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.cli.entry import build_parser
from tests.small_jobs import SmallJob

VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_BEARER_TOKEN_S3",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACEHUB_API_TOKEN",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_HEADERS",
    "WANDB_API_KEY",
    "GITHUB_TOKEN",
)
MALFORMED = {
    "whole": "{0}",
    "newline": "{0}\n",
    "carriage return": "{0}\r\n",
    "newline inside": "{0}\nX-Other: 1",
    "blank": "two {0} words",
    "not latin-1": "\u2019{0}\u2019",
    "not ascii": "caf\u00e9{0}",
    "quotes": "'{0}\"",
    "empty": "",
    "short": "1",
    "huge": "{0}" * 3000,
}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command that the parser knows, also one that is added tomorrow."""
    (found,) = (
        action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(found.choices)


def arguments_of(parser: argparse.ArgumentParser, *, place: str, folder: Path) -> list[str]:
    """The least that a command takes: what it reads is in a store, what it writes below a folder."""
    given: list[str] = []
    for action in parser._actions:
        if action.nargs == argparse.PARSER:  # a command within the command
            continue
        if action.option_strings and not action.required and action.dest != "address":
            continue
        value = place
        if action.choices:
            value = str(next(iter(action.choices)))
        elif action.type in (int, float):
            value = "1"
        elif action.dest == "address":
            value = os.environ["TEST_JOB_SERVER"]
        elif action.dest == "out":
            value = str(folder / "out")
        elif action.dest == "file":
            value = str(folder / "zoo.yaml")
        given += [action.option_strings[-1], value] if action.option_strings else [value]
    return given


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A server that tells whoever asks what it was sent, as a proxy's error page may."""

    def _refuse(self) -> None:
        body = f"<Error><Code>AccessDenied</Code><Message>{self.headers}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _refuse

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def secret_of(name: str) -> str:
    return f"{sum(map(ord, name)):04d}-LEAK-{name[::-1].replace('_', '-')}"


@pytest.fixture
def malformed(
    request: pytest.FixtureRequest, refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """All credentials at once, each malformed in the same way."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name in VARIABLES:
        monkeypatch.setenv(name, MALFORMED[request.param].format(secret_of(name)))
    settings = {
        "HOME": str(tmp_path / "home"),
        "FFSPLIT_CACHE": str(tmp_path / "cache"),
        "AWS_ENDPOINT_URL": refusing,
        "HF_ENDPOINT": refusing,
        "TEST_JOB_SERVER": refusing,
        "AWS_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "RAY_AUTH_MODE": "token",
        "FFSPLIT_LOG": "json",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which the suite sets
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", refusing)
    monkeypatch.chdir(tmp_path)
    return str(request.param)


def assert_nothing_leaks(text: str) -> None:
    for name in VARIABLES:
        for part in ("LEAK", secret_of(name)):
            assert part not in text, f"{part} of {name} in {text[:2000]}"


@pytest.mark.matrix()
@pytest.mark.parametrize("command", commands())
@pytest.mark.parametrize("malformed", MALFORMED, indirect=True)
def test_no_command_shows_a_credential(
    command: str, malformed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zoo.yaml").write_text(
        "destination: s3://bucket/zoo\nmodels: [{model: s3://bucket/model, keep: 0.5}]\n"
    )
    inner = ["s3://bucket/model", "--out", "s3://bucket/out", "--keep", "0.5"]
    for place in ("s3://bucket/run", "nobody/nothing"):
        arguments = arguments_of(commands()[command], place=place, folder=tmp_path)
        if command == "submit":
            arguments += ["compress", *inner]
        code = main([command, *arguments])
        captured = capsys.readouterr()
        assert_nothing_leaks(captured.out + captured.err)
        reads_nothing = command == "completion" or place == "nobody/nothing"
        assert code in (1, 2) or (code == 0 and reads_nothing), captured.err
        assert "Traceback" not in captured.err
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert_nothing_leaks(path.read_text("utf-8", "replace") + path.name)


@pytest.mark.parametrize("malformed", ["whole", "short"], indirect=True)
def test_a_run_leaves_documents_without_credentials(
    malformed: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A credential that got into a name that is recorded, as in a folder that was named by a script."""
    model = tmp_path / f"model-{os.environ['HF_TOKEN']}"
    shutil.copytree(small_job.model, model)
    small_job.model = model
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert_nothing_leaks(captured.out + captured.err)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert_nothing_leaks(path.read_bytes().decode("latin-1"))
    if malformed == "short":
        (manifest,) = (tmp_path / "out").glob("*/*/manifest.json")
        assert '"id": "model-1"' in manifest.read_text() and "***" not in manifest.read_text()


@pytest.mark.parametrize("malformed", ["newline", "not latin-1"], indirect=True)
def test_a_token_that_no_request_may_have_is_named(
    malformed: str, refusing: str, small_job: SmallJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["compress", *small_job.arguments("/tmp/never-written")]
    assert main(["submit", "--address", refusing, *job]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "RAY_AUTH_TOKEN has a blank, a line break or a character that is not ASCII" in line
