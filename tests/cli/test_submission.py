"""What `ffsplit submit` asks of a job server: which job it is, and whether to start it or follow one."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

import ffsplit
from ffsplit.cli import main
from ffsplit.cli.entry import build_parser
from ffsplit.cli.submission import Job, describe
from ffsplit.distributed.jobs import JobServer
from ffsplit.errors import ConfigError
from tests.small_jobs import SmallJob

Captured = pytest.CaptureFixture[str]


class Jobs:
    """A job server whose jobs are over as soon as they are there. It has no logs."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submitted: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.ends: dict[str, Any] = {"status": "SUCCEEDED"}
        self.url = ""

    def add(self, name: str, status: str) -> None:
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "entrypoint": "true",
            "status": status,
        }

    def answer(self, path: str, given: dict[str, Any] | None) -> object:
        parts = path.strip("/").split("/")[1:]
        if parts == ["version"]:
            return {"ray_version": ray.__version__}
        if parts[0] == "packages":  # a directory that was sent before
            return {}
        if parts == ["jobs"] and given is None:
            return list(self.jobs.values())
        if parts == ["jobs"] and given is not None:
            self.submitted.append(given)
            self.add(given["submission_id"], "RUNNING")
            return {"job_id": None, "submission_id": given["submission_id"]}
        if parts[2:] == ["stop"]:
            self.stopped.append(parts[1])
            return {"stopped": True}
        return self.jobs[parts[1]] | self.ends


@pytest.fixture
def server() -> Iterator[Jobs]:
    known = Jobs()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(known.answer(self.path, None))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.reply(known.answer(self.path, json.loads(body or b"{}")))

        def reply(self, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return None

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
    known.url = f"http://127.0.0.1:{listening.server_port}"
    yield known
    listening.shutdown()
    listening.server_close()


def described(*arguments: str) -> Job:
    return describe(arguments[0], arguments[1:], build_parser().parse_args(arguments))


def test_a_job_that_is_not_there_is_started_and_its_exit_code_kept(server: Jobs, capsys: Captured) -> None:
    server.ends = {"status": "FAILED", "driver_exit_code": 3}
    arguments = ["pull", "s3://runs/zoo", "/data/copy of it"]
    assert main(["submit", "--address", server.url, *arguments]) == 3
    (asked,) = server.submitted
    assert asked["entrypoint"] == "python -m ffsplit.cli pull s3://runs/zoo '/data/copy of it'"
    assert asked["submission_id"] == f"{described(*arguments).name}-1" and not asked["runtime_env"]
    assert capsys.readouterr().err == f"ffsplit: submitted {asked['submission_id']} to {server.url}\n"
    assert main(["submit", "--address", server.url, *arguments]) == 3
    assert f"ffsplit: following {asked['submission_id']}\n" == capsys.readouterr().err
    assert len(server.submitted) == 1


def test_a_job_that_is_done_is_followed_while_its_result_stands(
    small_job: SmallJob, tmp_path: Path, server: Jobs, capsys: Captured
) -> None:
    command = ["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")]
    name = described(*command).name
    server.add(f"{name}-1", "SUCCEEDED")
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    assert re.fullmatch(f"ffsplit-compress-{manifest.run_key}-[0-9a-f]{{6}}", name)
    assert described(*command) == (name, described(*command).entrypoint, True)
    capsys.readouterr()
    assert main(["submit", "--address", server.url, *command]) == 0
    assert capsys.readouterr().err == f"ffsplit: following {name}-1, which has succeeded\n"
    assert server.submitted == []
    shutil.rmtree(tmp_path / "out")
    assert main(["submit", "--address", server.url, *command]) == 0
    assert [asked["submission_id"] for asked in server.submitted] == [f"{name}-2"]


@pytest.mark.parametrize("stops", [False, True])
def test_who_interrupts_says_whether_the_job_goes_on(
    server: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: Captured, stops: bool
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobServer, "follow", interrupt)
    flags = ["--stop-on-interrupt"] if stops else []
    assert main(["submit", "--address", server.url, *flags, "pull", "s3://runs/zoo"]) == 130
    name = server.submitted[0]["submission_id"]
    assert server.stopped == ([name] if stops else [])
    said = capsys.readouterr().err.splitlines()[-1]
    ends = f"`ray job stop --address {server.url} {name}` stops it"
    assert said == f"ffsplit: interrupted; {name} " + (
        "is stopped" if stops else f"is still running: the same command follows it again, {ends}"
    )


def test_a_job_is_named_by_what_it_is_for() -> None:
    """By a hash of the request, where its key cannot be known here. How it is printed is no part of it."""
    one = described("benchmark", "s3://runs/zoo", "--pairs", "5")
    assert re.fullmatch("ffsplit-benchmark-[0-9a-f]{16}", one.name) and not one.is_done
    assert described("benchmark", "s3://runs/zoo", "--pairs", "5") == one
    assert described("benchmark", "s3://runs/zoo", "--pairs", "5", "--json").name == one.name
    assert described("benchmark", "s3://runs/zoo", "--pairs", "6").name != one.name


def test_a_fresh_run_is_a_job_of_its_own_each_time(small_job: SmallJob) -> None:
    command = ["compress", *small_job.arguments("/out", "--fresh")]
    names = {described(*command).name for _ in range(2)}
    assert len(names) == 2 and all(re.fullmatch("ffsplit-compress-[0-9a-f]{16}", name) for name in names)


def test_a_run_whose_parts_are_here_is_named_by_its_key_and_its_place(
    small_job: SmallJob, tmp_path: Path
) -> None:
    names = [
        described("compress", *small_job.arguments(tmp_path / out, "--workers", workers)).name
        for out, workers in (("one", "1"), ("one", "2"), ("two", "1"))
    ]
    assert names[0] == names[1] != names[2] and names[0][:-6] == names[2][:-6]
    statistics = described("calibrate", *small_job.arguments(tmp_path / "one")).name
    assert re.fullmatch("ffsplit-calibrate-[0-9a-f]{16}-[0-9a-f]{6}", statistics)


@pytest.mark.parametrize(
    "flags",
    [
        ["--calibration", "hf:imdb#text@train"],
        ["--eval", "lm-eval:arc_easy"],
        ["--stats", "s3://runs/zoo"],
        ["--recipe", "/no/such/recipe.yaml"],
        ["--eval", "sts:/no/such/pairs.csv#a"],
        ["model"],
    ],
    ids=" ".join,
)
def test_a_run_of_which_something_is_elsewhere_is_named_by_its_request(
    small_job: SmallJob, flags: list[str]
) -> None:
    """Nothing of it is read here."""
    if flags == ["model"]:
        small_job.model, flags = Path("org/name"), []
    name = described("compress", *small_job.arguments("/out", *flags)).name
    assert re.fullmatch("ffsplit-compress-[0-9a-f]{16}", name)


def test_a_batch_is_named_by_what_its_file_says(tmp_path: Path) -> None:
    def named(text: str) -> str:
        (tmp_path / "zoo.yaml").write_text(text)
        return described("zoo", str(tmp_path / "zoo.yaml")).name

    one = named("destination: /out\nmodels: [{model: m}]\n")
    assert re.fullmatch("ffsplit-zoo-[0-9a-f]{16}", one)
    assert named("# a comment\nmodels: [{model: m}]\ndestination: /out\n") == one
    assert named("destination: /out\nmodels: [{model: n}]\n") != one
    with pytest.raises(ConfigError, match="relative/out must be absolute in a job"):
        named("destination: relative/out\nmodels: [{model: m}]\n")


@pytest.mark.parametrize("argument", ["zoo.yaml", "csv:zoo.yaml#column"])
@pytest.mark.parametrize("sent", [None, "other", "."])
def test_a_relative_path_is_for_jobs_that_have_the_directory(
    server: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    sent: str | None,
    argument: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "zoo.yaml").write_text("destination: /out\nmodels: [{model: m}]\n")
    command = ["zoo", argument] if argument == "zoo.yaml" else ["pull", argument]
    flags = [] if sent is None else ["--working-dir", sent]
    code = main(["submit", "--address", server.url, *flags, *command])
    error = capsys.readouterr().err
    if sent == ".":
        (asked,) = server.submitted
        assert code == 0 and asked["runtime_env"]["working_dir"].startswith("gcs://")
    else:
        assert code == 2 and server.submitted == []
        assert error.startswith("ffsplit: zoo.yaml is relative to this directory") and error.count("\n") == 1
        assert "give --working-dir . before the command" in error
