"""Events of a batch: what hooks are told, and that a bad hook harms nothing."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ffsplit.errors import ConfigError
from ffsplit.zoo import events
from ffsplit.zoo.events import Events, Hook
from ffsplit.zoo.run import run_zoo
from ffsplit.zoo.zoo_file import Zoo, parse_zoo
from tests.zoo.test_page import ALL, batch

FILE: dict[str, Any] = {"destination": "/zoo", "models": [{"model": "/none", "name": "bad"}]}


def zoo(**fields: Any) -> Zoo:
    return parse_zoo(json.dumps(FILE | fields), where="zoo.yaml", name="nightly")


@contextmanager
def listening(*, status: int = 200) -> Iterator[tuple[str, list[tuple[dict[str, str], Any]]]]:
    """A webhook on loopback, and what was posted to it."""
    heard: list[tuple[dict[str, str], Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((dict(self.headers), json.loads(body)))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", heard
    finally:
        server.shutdown()
        server.server_close()


def told(hook: Hook) -> list[str]:
    """What the batch says while a hook gets three events."""
    said: list[str] = []
    told = Events(hook, said.append)
    told.tell("started", batch(1))
    told.tell("failed", batch(1, *ALL), model="bad")
    told.tell("finished", batch(1, *ALL))
    told.close()
    return said


def test_a_batch_tells_how_it_goes(tmp_path: Path) -> None:
    """To a command, one event after the other, each with the models that have ended."""
    script = tmp_path / "hook.py"
    script.write_text(f"import sys; open({str(tmp_path / 'heard')!r}, 'a').write(sys.stdin.read())")
    asked = zoo(destination=str(tmp_path / "zoo"), on_event={"command": [sys.executable, str(script)]})
    done = run_zoo(asked, runner="serial", say=lambda line: None)
    heard = [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
    assert [(each["event"], each["model"]) for each in heard] == [
        ("started", None),
        ("failed", "bad"),
        ("finished", None),
    ]
    assert [len(each["batch"]["models"]) for each in heard] == [0, 1, 1]
    assert {each["batch"]["id"] for each in heard} == {done.id}
    assert heard[2]["batch"]["models"] == json.loads(done.model_dump_json())["models"]


def test_a_webhook_gets_json_and_a_secret_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (url, heard):
        monkeypatch.setenv("MY_HOOK", url)
        monkeypatch.setenv("MY_TOKEN", "Bearer s3cr3t")
        hook = Hook(webhook="$MY_HOOK", headers={"Authorization": "$MY_TOKEN"})
        hook.check()
        assert told(hook) == []
    assert [body["event"] for _, body in heard] == ["started", "failed", "finished"]
    headers, body = heard[1]
    assert headers["Authorization"] == "Bearer s3cr3t" and headers["Content-Type"] == "application/json"
    assert body["model"] == "bad" and body["batch"]["models"][3]["state"] == "failed"
    assert body["schema_version"] == "1.0" and "s3cr3t" not in json.dumps(body)


def test_a_hook_that_fails_or_hangs_is_told_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(Hook(command=("/none/hook",)))[1] == (
        "on_event: failed bad was not delivered: /none/hook cannot be run: No such file or directory"
    )
    assert told(Hook(command=("false",)))[0] == "on_event: started was not delivered: false ended with code 1"
    slow = told(Hook(command=("sleep", "600"), timeout_s=0.2))
    assert slow[0] == "on_event: started was not delivered: sleep did not end within 0.2 s" and len(slow) >= 2
    monkeypatch.setattr(events, "LEAVE_WITHIN_S", 0.2)
    hung = told(Hook(command=("sleep", "600")))
    assert "on_event: the last events were not delivered: the hook is too slow" in hung
    with listening(status=500) as (url, _):
        assert "the webhook answered with status 500" in told(Hook(webhook=url))[0]
    secret = url.replace("/hook", "/s3cr3t")
    (refused, *_) = told(Hook(webhook=secret))  # nobody listens there any more
    assert "the webhook could not be reached" in refused and "s3cr3t" not in refused


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({}, "needs either a command, as in"),
        ("x", "needs either a command, as in"),
        ({"command": ["a"], "webhook": "https://h/p"}, "needs either a command, as in"),
        ({"webhook": "ftp://h/p"}, r"webhook must be an http\(s\) URL, or \$NAME"),
        (
            {"webhook": "https://h/p", "headers": {"Authorization": "s3cr3t"}},
            "headers: Authorization must",
        ),
        ({"command": ["a"], "headers": {"A": "$B"}}, "headers belong to a webhook"),
        ({"command": ["a"], "timeout_s": 0}, "on_event.timeout_s"),
    ],
)
def test_mistakes_in_the_file(hook: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^zoo.yaml: .*{message}"):
        zoo(on_event=hook)


def test_a_missing_variable_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_HOOK", raising=False)
    asked = zoo(destination=str(tmp_path / "zoo"), on_event={"webhook": "$NO_SUCH_HOOK"})
    with pytest.raises(ConfigError, match="on_event: the environment variable NO_SUCH_HOOK is not set"):
        run_zoo(asked, runner="serial")
    monkeypatch.setenv("NO_SUCH_HOOK", "not a URL")
    with pytest.raises(ConfigError, match=r"on_event: \$NO_SUCH_HOOK does not hold an http\(s\) URL"):
        run_zoo(asked, runner="serial")
    assert not (tmp_path / "zoo").exists()
