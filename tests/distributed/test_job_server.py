"""A job server that stops answering, or never ends what it was told to end: the wait for it has an end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from ffsplit.distributed import jobs
from ffsplit.distributed.jobs import Attempt, JobServer
from ffsplit.errors import ConfigError, FFSplitError

JOB = {"type": "SUBMISSION", "submission_id": "name-1", "entrypoint": "true", "status": "RUNNING"}


class Server:
    """Answers by the end of a path; whatever else is asked waits until the test is over."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {"/api/version": {"ray_version": ray.__version__}}
        self.refusals: list[str] = []
        self.asked: list[str] = []
        self.over = threading.Event()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, JobServer]]:
    for name in ("ANSWER_WITHIN_S", "LOOK_EVERY_S", "LOST_AFTER_S", "STOP_WITHIN_S", "POLL_EVERY_S"):
        monkeypatch.setattr(jobs, name, 0.1)
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.rstrip("/")
            known.asked.append(path)
            if path not in known.answers:
                known.over.wait()
                return
            answer = known.answers[path]
            if self.command == "POST" and known.refusals:
                answer = known.refusals.pop(0)
            body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(500 if isinstance(answer, str) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return None

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setattr(jobs, "ANSWER_WITHIN_S", 5.0)
    asked = JobServer(f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setattr(jobs, "ANSWER_WITHIN_S", 0.1)
    yield known, asked
    known.over.set()
    listening.shutdown()
    listening.server_close()


def test_a_question_that_is_not_answered(server: tuple[Server, JobServer]) -> None:
    with pytest.raises(FFSplitError, match=r"^Ray at .*: it did not answer within 0.1 s$"):
        server[1].last_attempt("name")


def test_a_submission_that_is_not_answered_may_have_arrived(server: tuple[Server, JobServer]) -> None:
    """So it is a failure, and what it failed of is told, not what the next question failed of."""
    with pytest.raises(FFSplitError, match="does not accept this job: it did not answer") as caught:
        server[1].start("name", after=None, entrypoint="true", working_dir=None)
    assert type(caught.value) is FFSplitError


def test_a_job_whose_server_is_gone(server: tuple[Server, JobServer]) -> None:
    with pytest.raises(FFSplitError, match=r"has not answered for 0.1 s \(.*\); name-1 may still run"):
        server[1].follow("name-1", lambda text: None)


def test_a_log_that_never_comes_holds_up_no_job_that_is_done(server: tuple[Server, JobServer]) -> None:
    server[0].answers["/api/jobs/name-1"] = JOB | {"status": "SUCCEEDED"}
    assert server[1].follow("name-1", lambda text: None) == 0


def test_the_newest_attempt_of_a_name_is_the_last(server: tuple[Server, JobServer]) -> None:
    ids = ("name-2", "other-7", "name-10", "name-x", "name-9")
    listed = [JOB | {"submission_id": each} for each in ids]
    server[0].answers["/api/jobs"] = [*listed, JOB | {"type": "DRIVER", "submission_id": None}]
    assert server[1].last_attempt("name") == Attempt("name-10", 10, "running", False, False)
    assert server[1].last_attempt("nam") is None


def test_who_submits_just_as_fast_shares_the_attempt(server: tuple[Server, JobServer]) -> None:
    """The server takes an id once, and lists the other's job by then."""
    server[0].answers["/api/jobs"] = [JOB, JOB | {"submission_id": "name-3"}]
    second = Attempt("name-2", 2, "failed", True, False)
    assert server[1].start("name", after=second, entrypoint="true", working_dir=None) == "name-3"
    with pytest.raises(ConfigError, match="does not accept this job"):
        server[1].start("name", after=None, entrypoint="true", working_dir=None)


def test_a_log_that_breaks_is_taken_up_where_it_broke(
    server: tuple[Server, JobServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence of a job that runs is no reason to stop listening."""
    written: list[str] = []
    attempts = 0

    async def tail(submission_id: str) -> AsyncIterator[str]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await asyncio.sleep(0.3)
            yield "one\ntw"
            raise ConnectionError("reset")
        server[0].answers["/api/jobs/name-1"] = JOB | {"status": "SUCCEEDED"}
        for chunk in ("one\n", "two\nthr", "ee\n"):
            yield chunk

    server[0].answers["/api/jobs/name-1"] = JOB
    monkeypatch.setattr(jobs, "ANSWER_WITHIN_S", 5.0)
    monkeypatch.setattr(server[1]._client, "tail_job_logs", tail)
    assert server[1].follow("name-1", written.append) == 0
    assert written == ["one\ntw", "o\nthr", "ee\n"]


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "STOPPED"}, 130),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": -9}, "the job's process was killed by SIGKILL"),
        ({"status": "FAILED", "driver_exit_code": -99}, "the job's process was killed by signal 99"),
        ({"status": "FAILED", "message": "its node died\nTrace"}, "the job failed: its node died$"),
    ],
)
def test_the_exit_code_is_that_of_the_process(
    server: tuple[Server, JobServer], fields: dict[str, object], outcome: int | str
) -> None:
    server[0].answers["/api/jobs/name-1"] = JOB | fields
    if isinstance(outcome, int):
        assert server[1].follow("name-1", lambda text: None) == outcome
    else:
        with pytest.raises(FFSplitError, match=outcome):
            server[1].follow("name-1", lambda text: None)


def test_a_job_that_stops(server: tuple[Server, JobServer]) -> None:
    server[0].answers |= {
        "/api/jobs/name-1/stop": {"stopped": True},
        "/api/jobs/name-1": JOB | {"status": "STOPPED"},
    }
    server[1].stop("name-1")
    assert server[0].asked[-2:] == ["/api/jobs/name-1/stop", "/api/jobs/name-1"]


def test_a_job_that_does_not_stop(server: tuple[Server, JobServer]) -> None:
    server[0].answers |= {"/api/jobs/name-1/stop": {"stopped": True}, "/api/jobs/name-1": JOB}
    with pytest.raises(
        FFSplitError, match=r"^name-1 has not ended in 0.1 s, and may still run: `ray job status"
    ):
        server[1].stop("name-1")


def test_a_cluster_without_an_agent_is_asked_again(
    server: tuple[Server, JobServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while its nodes start. After a while it is a failure, in its own words."""
    monkeypatch.setattr(jobs, "AGENT_WITHIN_S", 30.0)
    none = "No available agent to submit job, please try again later."
    known, asked = server
    known.answers["/api/jobs"] = {"submission_id": "name-1", "job_id": "name-1"}
    known.refusals = [none, none]
    assert asked.start("name", after=None, entrypoint="true", working_dir=None) == "name-1"
    assert known.refusals == []
    monkeypatch.setattr(jobs, "AGENT_WITHIN_S", 0.0)
    known.refusals = [none]
    with pytest.raises(FFSplitError, match="has had no agent to start the job for 0 s") as caught:
        asked.start("name", after=None, entrypoint="true", working_dir=None)
    assert type(caught.value) is FFSplitError
