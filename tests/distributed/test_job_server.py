"""A job server that stops answering, or never ends what it was told to end: the wait for it has an end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from ffsplit.distributed import jobs
from ffsplit.distributed.jobs import JobServer
from ffsplit.errors import FFSplitError

JOB = {"type": "SUBMISSION", "submission_id": "name-1", "entrypoint": "true", "status": "RUNNING"}


class Server:
    """Answers by the end of a path; whatever else is asked waits until the test is over."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {"/api/version": {"ray_version": ray.__version__}}
        self.over = threading.Event()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, JobServer]]:
    for name in ("ANSWER_WITHIN_S", "LOOK_EVERY_S", "LOST_AFTER_S", "STOP_WITHIN_S", "POLL_EVERY_S"):
        monkeypatch.setattr(jobs, name, 0.1)
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.rstrip("/")
            if path not in known.answers:
                known.over.wait()
                return
            body = json.dumps(known.answers[path]).encode()
            self.send_response(200)
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
    with pytest.raises(FFSplitError, match="takes no such job: it did not answer") as caught:
        server[1].start("name", after=None, entrypoint="true", working_dir=None)
    assert type(caught.value) is FFSplitError


def test_a_job_whose_server_is_gone(server: tuple[Server, JobServer]) -> None:
    with pytest.raises(FFSplitError, match=r"has not answered for 0.1 s \(.*\); name-1 may still run"):
        server[1].follow("name-1", lambda text: None)


def test_a_log_that_never_comes_holds_up_no_job_that_is_done(server: tuple[Server, JobServer]) -> None:
    server[0].answers["/api/jobs/name-1"] = JOB | {"status": "SUCCEEDED"}
    assert server[1].follow("name-1", lambda text: None) == 0


def test_a_job_that_does_not_stop(server: tuple[Server, JobServer]) -> None:
    server[0].answers |= {"/api/jobs/name-1/stop": {"stopped": True}, "/api/jobs/name-1": JOB}
    with pytest.raises(
        FFSplitError, match=r"^name-1 has not ended in 0.1 s, and may still run: `ray job status"
    ):
        server[1].stop("name-1")
