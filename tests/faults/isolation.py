"""Ray listens on every interface: clusters of tests get a network, a token and a folder of their own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@cache
def can(*flags: str) -> bool:
    """Whether this system lets us unshare these namespaces and set them up."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    probe = subprocess.run(["unshare", *flags, "ip", "link", "set", "lo", "up"], capture_output=True)
    return probe.returncode == 0


NETWORK = ("-n",)
EVERYTHING = ("-n", "-m", "-p", "-f", "--mount-proc", "--kill-child")
"""A network, mounts and processes: what the command starts ends with it, and it sees nothing else."""


def isolated(command: Sequence[str], *, flags: Sequence[str] = NETWORK) -> list[str]:
    """The command in namespaces of its own, where that is allowed."""
    if not can(*flags):
        return list(command)
    return ["unshare", *flags, "bash", "-c", 'ip link set lo up; exec "$@"', "bash", *command]


@contextmanager
def environment_of_ray(folder: Path, **more: str) -> Iterator[dict[str, str]]:
    """What a cluster's processes and drivers need to find each other, and nobody else."""
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    short = Path("/tmp") / f"ffsplit-{secrets.token_hex(4)}"  # Ray's socket paths may not be long
    binaries = Path(sys.executable).parent
    try:
        yield os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(short),
            "RAY_USAGE_STATS_ENABLED": "0",
            **more,
        }
    finally:
        shutil.rmtree(short, ignore_errors=True)


def answer_of(module: str, *arguments: str, folder: Path, timeout_s: float) -> Any:
    """The JSON that a module prints last, run with clusters of its own in namespaces of its own."""
    command = isolated([sys.executable, "-m", module, *arguments], flags=EVERYTHING)
    with environment_of_ray(folder) as environment:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
