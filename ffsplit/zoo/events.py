"""What a batch tells others as it goes: its events, as JSON, to a command or a webhook.

One thread delivers them in order. Nothing that a hook does, or fails to do, changes the batch.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import Field, model_validator

from ffsplit.config import Record, Texts
from ffsplit.errors import ConfigError
from ffsplit.redaction import redacted, without_credentials
from ffsplit.store.schema import UtcTime, Versioned
from ffsplit.zoo.batch import Batch

Name = Literal["started", "published", "refused", "failed", "finished"]
LEAVE_WITHIN_S = 30.0
"""How long a batch that has ended waits for its hook."""

NEEDED = "needs either a command, as in {command: [./tell.sh]}, or {webhook: https://host/path}"

_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")


class Hook(Record):
    """Where events go. `$NAME` stands for an environment variable, so that the file holds no secret."""

    command: Texts = Field(default=(), description="gets the event's JSON on stdin")
    webhook: str | None = Field(default=None, description="a URL, or $NAME; gets the event's JSON by POST")
    headers: dict[str, str] = Field(default={}, description="of the webhook: each value is $NAME")
    timeout_s: float = Field(default=30.0, gt=0, le=600)

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, given: Any) -> Any:
        if not isinstance(given, dict | Hook):
            raise ValueError(NEEDED)
        return given

    @model_validator(mode="after")
    def _calls_something(self) -> Hook:
        if bool(self.command) == bool(self.webhook):
            raise ValueError(NEEDED)
        if self.webhook and not _URL.fullmatch(self.webhook) and not _VARIABLE.fullmatch(self.webhook):
            raise ValueError("webhook must be an http(s) URL, or $NAME of an environment variable with one")
        if self.headers and not self.webhook:
            raise ValueError("headers belong to a webhook")
        for name, value in self.headers.items():
            if not _VARIABLE.fullmatch(value):
                raise ValueError(f"headers: {name} must be $NAME of an environment variable")
        return self

    def check(self) -> None:
        """Raise ConfigError if an environment variable is missing, or holds something else than a URL."""
        for value in (self.webhook or "", *self.headers.values()):
            if (match := _VARIABLE.fullmatch(value)) and not os.environ.get(match[1]):
                raise ConfigError(f"on_event: the environment variable {match[1]} is not set: set it")
        if self.webhook and not _URL.fullmatch(_value_of(self.webhook)):
            raise ConfigError(f"on_event: {self.webhook} does not hold an http(s) URL: fix the variable")


class Event(Versioned):
    """One event, and the batch so far: the models that have ended."""

    event: Name
    at: UtcTime
    model: str | None = Field(description="the model's name in the zoo file; null for started and finished")
    batch: Batch


class Events:
    """Hands events to a hook, in order, in a thread of its own."""

    def __init__(self, hook: Hook | None, say: Callable[[str], None]) -> None:
        self._hook, self._say = hook, say
        self._waiting: queue.Queue[Event | None] = queue.Queue()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="ffsplit-events")
        if hook is not None:
            self._thread.start()

    def tell(self, name: Name, batch: Batch, *, model: str | None = None) -> None:
        """Queue an event, and return at once."""
        if self._hook is not None:
            at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self._waiting.put(Event(event=name, at=at, model=model, batch=batch))

    def close(self) -> None:
        """Wait until all are delivered, but not for long."""
        if self._hook is None:
            return
        self._waiting.put(None)
        self._thread.join(min(LEAVE_WITHIN_S, self._hook.timeout_s + 1))
        if self._thread.is_alive():
            if (process := self._process) is not None:
                _kill(process)
            self._say("on_event: the last events were not delivered: the hook is too slow")

    def _deliver(self) -> None:
        assert self._hook is not None
        while (event := self._waiting.get()) is not None:
            data = without_credentials(event).model_dump_json().encode() + b"\n"  # a line of a file
            try:
                problem = self._run(self._hook, data) if self._hook.command else _post(self._hook, data)
            except Exception as error:  # whatever it is, the batch goes on
                problem = f"{type(error).__name__}: {error}"
            if problem is not None:
                about = event.event if event.model is None else f"{event.event} {event.model}"
                self._say(f"on_event: {about} was not delivered: {redacted(problem)}")

    def _run(self, hook: Hook, data: bytes) -> str | None:
        """Call the command. Returns what went wrong."""
        name = hook.command[0]
        try:
            self._process = process = subprocess.Popen(
                hook.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return f"{name} cannot be run: {error.strerror}"
        try:
            process.communicate(data, timeout=hook.timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"{name} did not end within {hook.timeout_s:g} s"
        return None if process.returncode == 0 else f"{name} ended with code {process.returncode}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _post(hook: Hook, data: bytes) -> str | None:
    """POST an event. Errors do not show the URL, whose path or query may be a secret."""
    import urllib3

    assert hook.webhook is not None
    headers = {name: _value_of(value) for name, value in hook.headers.items()}
    with urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=hook.timeout_s)) as pool:
        try:
            reply = pool.request(
                "POST",
                _value_of(hook.webhook),
                body=data,
                headers={"Content-Type": "application/json", **headers},
                preload_content=False,
            )
            status = reply.status
            reply.close()  # the body does not matter, and may never end
        except urllib3.exceptions.NewConnectionError:  # which counts as a timeout
            return "the webhook could not be reached: nobody listens there"
        except urllib3.exceptions.TimeoutError:
            return f"the webhook did not answer within {hook.timeout_s:g} s"
        except urllib3.exceptions.HTTPError as error:
            return f"the webhook could not be reached: {type(error).__name__}"
    return None if status < 300 else f"the webhook answered with status {status}"


def _value_of(text: str) -> str:
    """The text itself, or the content of the variable that it names."""
    match = _VARIABLE.fullmatch(text)
    return os.environ.get(match[1], "") if match else text
