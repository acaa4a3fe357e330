"""Jobs on a remote cluster, through its job server."""

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
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ffsplit.compat.ray import find_token, server_version
from ffsplit.distributed.ray_cluster import token_problem
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.exit_codes import DONE, INTERRUPTED

CONNECT_TIMEOUT_S = 10.0
ANSWER_WITHIN_S = 60.0
"""How long a job server may take to answer a request, including an upload."""
POLL_EVERY_S = 0.5
LOOK_EVERY_S = 30.0
"""How often the state of a job that prints nothing is checked."""
LOST_AFTER_S = 120.0
"""How long a job server may be silent before its follower gives up. The job itself continues."""
AGENT_WITHIN_S = 60.0
"""How long a cluster whose nodes are starting may have no agent to start a job."""
NO_AGENT = "No available agent"
STOP_WITHIN_S = 120.0
"""How long a job may take to end after it is stopped."""


class Attempt(NamedTuple):
    """One submission of a job: attempt 3 of `name` is called `name-3`."""

    id: str
    number: int
    state: str
    is_over: bool
    has_succeeded: bool


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a timeout: without one it waits for an answer for ever."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, **({"timeout": ANSWER_WITHIN_S} | options))


class JobServer:
    """The job server of a cluster. Raises ConfigError if it cannot be reached or has another version."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            _check_listening(address)
            find_token()
            self._client = _Client(address)
        except AuthenticationError:
            raise ConfigError(token_problem(address)) from None
        except Exception as error:  # any server may listen there and answer anything
            raise ConfigError(f"Ray at {address} cannot be reached: {_reason(error)}") from error
        logging.getLogger("ray").setLevel(logging.ERROR)
        theirs = server_version(self._client)
        if theirs != ray.__version__:
            raise ConfigError(
                f"Ray at {address} is version {theirs}, but {ray.__version__} here: "
                f"pip install 'ray[default]=={theirs}', or submit from a node of the cluster"
            )

    def last_attempt(self, name: str) -> Attempt | None:
        """The newest submission under a name; None if there is none."""
        found = [attempt for job in self._ask(self._client.list_jobs) if (attempt := _attempt(job, name))]
        return max(found, key=lambda attempt: attempt.number, default=None)

    def start(self, name: str, *, after: Attempt | None, entrypoint: str, working_dir: Path | None) -> str:
        """Submit the attempt that follows another. Returns its id, even if someone else submitted it first.

        The runtime environment holds the working directory and nothing else: everybody who may list jobs can
        see it.
        """
        submission_id = f"{name}-{after.number + 1 if after else 1}"
        runtime_env: dict[str, Any] = {} if working_dir is None else {"working_dir": str(working_dir)}
        gives_up_at = time.monotonic() + AGENT_WITHIN_S
        while True:
            try:
                return str(
                    self._client.submit_job(
                        entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env
                    )
                )
            except Exception as error:
                with suppress(FFSplitError):  # if this request fails too, report the first error
                    newest = self.last_attempt(name)
                    if newest is not None and newest.id == submission_id:
                        return submission_id
                if NO_AGENT not in str(error):
                    message = f"Ray at {self.address} does not accept this job: {_reason(error)}"
                    raise (FFSplitError if isinstance(error, OSError) else ConfigError)(message) from error
                if time.monotonic() >= gives_up_at:
                    raise FFSplitError(
                        f"Ray at {self.address} has had no agent to start the job for {AGENT_WITHIN_S:g} s: "
                        "its nodes may still be starting, so try again, or read dashboard_agent.log there"
                    ) from error
            time.sleep(POLL_EVERY_S)

    def follow(self, submission_id: str, write: Callable[[str], object]) -> int:
        """Print a job's output until it is over. Returns the exit code of its process.

        A broken connection is reopened, and nothing is printed twice.
        """
        num_shown, lost_since = 0, None
        while True:
            num_shown = asyncio.run(self._tail(submission_id, write, skip=num_shown))
            try:
                info = self._client.get_job_info(submission_id)
                lost_since = None
            except Exception as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_AFTER_S:
                    raise FFSplitError(
                        f"Ray at {self.address} has not answered for {LOST_AFTER_S:g} s ({_reason(error)}); "
                        f"{submission_id} may still run: the same command follows it again"
                    ) from error
            else:
                if info.status.is_terminal():
                    return _exit_code(info)
            time.sleep(POLL_EVERY_S)

    async def _tail(self, submission_id: str, write: Callable[[str], object], *, skip: int) -> int:
        """Print the log from the character `skip` on. Returns the number of characters printed in total.

        A job may be silent for hours, but so may a lost server. During silence the job's state is checked.
        """
        position = 0
        log = self._client.tail_job_logs(submission_id)
        coming = asyncio.ensure_future(anext(log))
        try:
            with suppress(Exception):  # the log has ended or broken off: the printed part stays
                while True:
                    arrived, _ = await asyncio.wait({coming}, timeout=LOOK_EVERY_S)
                    if not arrived:
                        info = await asyncio.to_thread(self._client.get_job_info, submission_id)
                        if info.status.is_terminal():
                            return skip
                        continue
                    chunk = coming.result()
                    position += len(chunk)
                    if position > skip:
                        new = position - skip
                        write(chunk[len(chunk) - new :] if new < len(chunk) else chunk)
                        skip = position
                    coming = asyncio.ensure_future(anext(log))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        return skip

    def stop(self, submission_id: str) -> None:
        """Stop a job, and wait until it has ended. Raises FFSplitError if that takes too long."""
        self._ask(lambda: self._client.stop_job(submission_id))
        told_at = time.monotonic()
        while not self._ask(lambda: self._client.get_job_status(submission_id)).is_terminal():
            if time.monotonic() - told_at > STOP_WITHIN_S:
                raise FFSplitError(
                    f"{submission_id} has not ended in {STOP_WITHIN_S:g} s, and may still run: "
                    f"`ray job status --address {self.address} {submission_id}`"
                )
            time.sleep(POLL_EVERY_S)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:
            raise FFSplitError(f"Ray at {self.address}: {_reason(error)}") from error


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
    """The exit code of a job's process. (`ray job submit` always makes it 1.)"""
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
    raise FFSplitError(f"the job's process was killed by {names.get(-code, f'signal {-code}')}")


def _check_listening(address: str) -> None:
    """Raise OSError unless something listens at the address. Ray itself would wait for minutes.

    Raises ConfigError for a token with invalid characters, which an HTTP library would quote in its error.
    """
    if not re.fullmatch(r"[\x21-\x7e]*", os.environ.get("RAY_AUTH_TOKEN", "")):
        raise ConfigError(
            "RAY_AUTH_TOKEN has a blank, a line break or a character that is not ASCII: copy it again"
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("give the job server's address, such as http://127.0.0.1:8265")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()


def _first_line(message: object) -> str:
    return next(iter(str(message).strip().splitlines()), type(message).__name__)


def _reason(error: Exception) -> str:
    """Why a request failed, in one line."""
    if isinstance(error, requests.Timeout):
        return f"it did not answer within {ANSWER_WITHIN_S:g} s"
    return _first_line(error)
