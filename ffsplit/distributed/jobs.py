"""Jobs on a cluster that is elsewhere, through its job server."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.exit_codes import DONE, INTERRUPTED

CONNECT_TIMEOUT_S = 10.0
POLL_EVERY_S = 0.5
LOST_AFTER_S = 120.0
"""How long a job server may be silent before its follower gives up; the job itself goes on."""


class Attempt(NamedTuple):
    """One submission of a job: attempt 3 of `name` is called `name-3`."""

    id: str
    number: int
    state: str
    is_over: bool
    has_succeeded: bool


class JobServer:
    """The job server of a cluster. Raises ConfigError when it cannot be reached or is another version."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            _check_listening(address)
            self._client = JobSubmissionClient(address)
        except AuthenticationError:
            raise ConfigError(
                f"Ray at {address} refuses this token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            ) from None
        except (ConnectionError, RuntimeError, ValueError, OSError, KeyError) as error:
            raise ConfigError(f"Ray at {address} cannot be reached: {_first_line(error)}") from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        theirs = getattr(self._client, "_server_ray_version", None)
        if theirs != ray.__version__:
            raise ConfigError(
                f"Ray at {address} is version {theirs}, here it is {ray.__version__}: "
                f"pip install 'ray[default]=={theirs}', or submit from a node of the cluster"
            )

    def last_attempt(self, name: str) -> Attempt | None:
        """The newest submission under a name, None when there is none."""
        found = [attempt for job in self._ask(self._client.list_jobs) if (attempt := _attempt(job, name))]
        return max(found, key=lambda attempt: attempt.number, default=None)

    def start(self, name: str, *, after: Attempt | None, entrypoint: str, working_dir: Path | None) -> str:
        """Submit the attempt that follows another; returns its id, or that of one who was just as fast.

        The runtime environment holds the working directory and nothing else: it is shown to everybody
        who may list jobs.
        """
        submission_id = f"{name}-{after.number + 1 if after else 1}"
        runtime_env: dict[str, Any] = {} if working_dir is None else {"working_dir": str(working_dir)}
        try:
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env
                )
            )
        except (RuntimeError, ValueError, OSError) as error:
            newest = self.last_attempt(name)
            if newest is not None and newest.id == submission_id:
                return submission_id
            raise ConfigError(f"Ray at {self.address} takes no such job: {_first_line(error)}") from None

    def follow(self, submission_id: str, write: Callable[[str], object]) -> int:
        """Pass on what a job prints until it is over. Returns the exit code of its process.

        A connection that breaks is made anew, and nothing is printed twice.
        """
        num_shown, lost_since = 0, None
        while True:
            with suppress(RuntimeError, OSError, ValueError):
                num_shown = asyncio.run(self._tail(submission_id, write, skip=num_shown))
            try:
                info = self._client.get_job_info(submission_id)
                lost_since = None
            except (RuntimeError, OSError, ValueError) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_AFTER_S:
                    raise FFSplitError(
                        f"Ray at {self.address} no longer answers ({_first_line(error)}); {submission_id} "
                        "may still run: the same command follows it again"
                    ) from None
            else:
                if info.status.is_terminal():
                    return _exit_code(info)
            time.sleep(POLL_EVERY_S)

    async def _tail(self, submission_id: str, write: Callable[[str], object], *, skip: int) -> int:
        """Pass the log on from a character on; returns how many characters are passed on in all."""
        position = 0
        with suppress(RuntimeError, OSError):  # what came before the break counts
            async for chunk in self._client.tail_job_logs(submission_id):
                position += len(chunk)
                if position > skip:
                    write(chunk[len(chunk) - (position - skip) :] if position - len(chunk) < skip else chunk)
                    skip = position
        return skip

    def stop(self, submission_id: str) -> None:
        """End a job, and wait until it has ended."""
        self._ask(lambda: self._client.stop_job(submission_id))
        while not self._ask(lambda: self._client.get_job_status(submission_id)).is_terminal():
            time.sleep(POLL_EVERY_S)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (RuntimeError, OSError, ValueError) as error:
            raise FFSplitError(f"Ray at {self.address}: {_first_line(error)}") from None


def _attempt(job: JobDetails, name: str) -> Attempt | None:
    match = re.fullmatch(rf"{re.escape(name)}-(\d+)", job.submission_id or "")
    if match is None:
        return None
    return Attempt(
        id=str(job.submission_id),
        number=int(match[1]),
        state=str(job.status.value).lower(),
        is_over=job.status.is_terminal(),
        has_succeeded=job.status == JobStatus.SUCCEEDED,
    )


def _exit_code(info: JobDetails) -> int:
    """The exit code of a job's process, which `ray job submit` makes 1 whatever it was."""
    if info.status == JobStatus.SUCCEEDED:
        return DONE
    if info.status == JobStatus.STOPPED:
        return INTERRUPTED
    code = info.driver_exit_code
    if code is not None and code > 0:
        return int(code)
    if code is None:
        raise FFSplitError(f"the job failed: {_first_line(info.message)}")
    names = {each.value: each.name for each in signal.Signals}
    raise FFSplitError(f"the job's process was ended by {names.get(-code, f'signal {-code}')}")


def _check_listening(address: str) -> None:
    """Raise OSError unless something listens there, where Ray itself would wait for minutes.

    Raises ConfigError for a token that no request may have, which an HTTP library would quote.
    """
    if not re.fullmatch(r"[\x21-\x7e]*", os.environ.get("RAY_AUTH_TOKEN", "")):
        raise ConfigError(
            "RAY_AUTH_TOKEN has a blank, a line break or a character that is not ASCII: copy it again"
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("its job server is at an address like http://127.0.0.1:8265")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()


def _first_line(message: object) -> str:
    return next(iter(str(message).strip().splitlines()), type(message).__name__)
