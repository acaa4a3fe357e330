"""Servers on loopback: where they are, how they are started and stopped, what they are reached with."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path(os.environ.get("FFSPLIT_TEST_SERVERS_CACHE") or "~/.cache/ffsplit-test-servers").expanduser()

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A running server, the account that may do anything in it, and the keys of one that may do nothing."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    stranger: tuple[str, str]
    atomic_create: bool

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 reads; nothing else of this machine is to reach it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "FFSPLIT_S3_PATH_STYLE": "1",
            "NO_PROXY": "127.0.0.1",
        }


class CannotStart(Exception):
    """A server that this machine cannot have, and why."""


@dataclass
class Processes:
    """The processes of one server, each with its log, stopped together."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    env=os.environ | self.environment,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )

    def run(self, command: list[str], *, timeout_s: float = 60) -> str:
        """The output of a command that ends. Raises CannotStart when it fails."""
        return run(command, timeout_s=timeout_s, environment=self.environment)

    def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGKILL)
        for process in self.running:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _die_with_parent() -> None:
    """Tests that are killed leave no server behind, where the system can see to it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: list[str], *, timeout_s: float, environment: dict[str, str] | None = None) -> str:
    """The output of a command that ends. Raises CannotStart when it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=os.environ | (environment or {}),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotStart(f"{command[0]}: {error}") from error
    if done.returncode:
        raise CannotStart(f"{' '.join(command)[:120]}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(port: int, *, within_s: float) -> None:
    """Return once somebody listens. Raises CannotStart when nobody does."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise CannotStart(f"nothing listens on port {port} after {within_s} s")
