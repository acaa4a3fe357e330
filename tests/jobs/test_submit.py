"""`ffsplit submit` for real: one job a run, followed, with the exit code that it really had."""

from __future__ import annotations

import http.server
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.store.pull import verify
from tests.jobs.ray_head import Cluster
from tests.small_jobs import PRUNE, SmallJob

FOR_HOURS = "{kind: distill, num_steps: 10000000}"
JOBS = "import json; from ray.job_submission import JobSubmissionClient as C; import sys\n"
JOBS += "print(json.dumps([json.loads(j.json()) for j in C(sys.argv[1]).list_jobs()]))"


def submit(cluster: Cluster, *arguments: str) -> list[str]:
    return ["python", "-m", "ffsplit.cli", "submit", "--address", cluster.url, *arguments]


def submission_of(err: str) -> str:
    """The id in the line that says what is followed."""
    line = next(line for line in err.splitlines() if "ffsplit-" in line)
    return next(word.rstrip(",") for word in line.split() if word.startswith("ffsplit-"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_is_one_job_and_its_exit_code_is_kept(
    small_job: SmallJob, tmp_path: Path, cluster: Cluster
) -> None:
    out = tmp_path / "out"
    command = submit(cluster, "compress", *small_job.arguments(out, "--runner", "serial"))
    first = cluster.run(*command, AWS_SECRET_ACCESS_KEY="never-to-be-seen")
    assert first.returncode == 0, first.stdout + first.stderr
    assert verify(str(out)).ok and "artifact:" in first.stdout
    run_key = next(path.parent.name for path in out.glob("*/commit.json"))
    name = submission_of(first.stderr)
    assert name.startswith(f"ffsplit-compress-{run_key}-") and name.endswith("-1")

    again = cluster.run(*command)
    assert (again.returncode, submission_of(again.stderr)) == (0, name)
    assert "which has succeeded" in again.stderr and again.stdout == first.stdout

    shutil.rmtree(out)
    anew = cluster.run(*command)
    assert (anew.returncode, submission_of(anew.stderr)) == (0, name.removesuffix("1") + "2")
    assert verify(str(out)).ok

    refused = submit(
        cluster, "compress", *small_job.arguments(out, "--runner", "serial", "--gate", "fidelity >= 0.99999")
    )
    done = [cluster.run(*refused) for _ in range(2)]
    assert [each.returncode for each in done] == [3, 3]
    assert "gate fidelity >= 0.99999: 0." in done[0].stdout
    assert [submission_of(each.stderr)[-2:] for each in done] == ["-1", "-2"]

    jobs = cluster.run("python", "-c", JOBS, cluster.url).stdout
    assert "never-to-be-seen" not in jobs
    assert all(
        not job["runtime_env"] for job in json.loads(jobs) if name[:-2] in (job["submission_id"] or "")
    )


@pytest.mark.slow
@pytest.mark.ray
def test_the_job_outlives_its_follower_unless_it_is_told_otherwise(
    small_job: SmallJob, tmp_path: Path, cluster: Cluster
) -> None:
    shutil.copy(small_job.text, tmp_path / "relative.txt")
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial")
    arguments[arguments.index(str(small_job.text))] = "relative.txt"
    lost = cluster.run(*submit(cluster, "compress", *arguments), cwd=tmp_path)
    assert lost.returncode == 2 and "give --working-dir ." in lost.stderr
    command = submit(cluster, "--working-dir", ".", "compress", *arguments)
    follower = cluster.start(*command, cwd=tmp_path)
    assert follower.stdout is not None and follower.stderr is not None
    assert any("run " in line for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130
    name = submission_of(err)
    assert f"{name} is still running: the same command follows it again" in err
    done = cluster.run(*command, cwd=tmp_path)
    assert (done.returncode, submission_of(done.stderr)) == (0, name)
    assert verify(str(tmp_path / "out")).ok

    stopped = tmp_path / "stopped"
    arguments = small_job.arguments(stopped, "--runner", "serial")
    arguments[arguments.index("--recipe") + 1] = small_job.recipe(step=f"{PRUNE}, {FOR_HOURS}")
    follower = cluster.start(*submit(cluster, "--stop-on-interrupt", "compress", *arguments), cwd=tmp_path)
    assert follower.stdout is not None
    assert any("run " in line for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130 and "is stopped" in err
    assert not list(stopped.glob("*/commit.json"))


@pytest.mark.ray
def test_a_wrong_token_is_one_line(small_job: SmallJob, tmp_path: Path, cluster: Cluster) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 32)
    command = submit(cluster, "compress", *small_job.arguments(tmp_path / "out"))
    done = cluster.run(*command, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 2, done.stderr
    assert "rejects the token that is set here" in done.stderr.splitlines()[-1]
    without = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "HOME": str(tmp_path)}
    done = cluster.run(*command, **without)
    assert done.returncode == 2, done.stderr
    assert "requires a token, and none is set here" in done.stderr.splitlines()[-1]


class OtherVersion(http.server.BaseHTTPRequestHandler):
    """What a cluster of another Ray says of itself."""

    def do_GET(self) -> None:
        body = json.dumps({"version": "4", "ray_version": "2.49.0", "ray_commit": "c"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_version() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherVersion) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_another_version_of_ray_is_one_line(
    other_version: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(other_version, "is version 2.49.0, but", small_job, tmp_path, capsys)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:1", "Ray at http://127.0.0.1:1 cannot be reached"),
        ("127.0.0.1:6379", "address, such as http://127.0.0.1:8265"),
    ],
)
def test_an_unreachable_cluster_is_one_line(
    address: str, expected: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(address, expected, small_job, tmp_path, capsys)


def assert_refused(
    address: str, expected: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small_job.arguments(tmp_path / "out")
    assert main(["submit", "--address", address, "compress", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not (tmp_path / "out").exists()


BAD: dict[str, tuple[list[str], str]] = {
    "a relative output": (["compress", "m", "--out", "here"], "here must be absolute in a job"),
    "a mistake in the command": (["compress", "m", "--out", "/o", "--keep", "half"], "--keep"),
    "no such command": (["sumbit", "m"], "invalid choice"),
    "no such directory": (["--working-dir", "/none", "compress", "m", "--out", "/o"], "--working-dir /none"),
    "no command": ([], "required"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_said_before_anything_is_submitted(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = BAD[name]
    assert main(["submit", "--address", "http://127.0.0.1:1", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.count("\n") == 1
