"""Addresses at which no Ray answers: one line for each, and an end to every wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from socket import create_server

import grpc
import psutil
import pytest
import ray

from ffsplit.cli import main
from ffsplit.distributed import jobs, ray_cluster
from ffsplit.distributed.jobs import JobServer
from ffsplit.distributed.ray_cluster import Share, connect
from ffsplit.errors import ConfigError
from tests.distributed.listeners import hanging_grpc, other_grpc, silent, web_server
from tests.small_jobs import SmallJob

Listener = Callable[[], AbstractContextManager[int]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "ANSWER_WITHIN_S", 0.5)
    monkeypatch.setattr(jobs, "ANSWER_WITHIN_S", 0.5)


def closed_port() -> int:
    with closing(create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("listener", "told"),
    [
        (silent, "it accepts connections but sent nothing in 0.5 s"),
        (web_server, "the server there is not a Ray head"),
        (hanging_grpc, "its head did not answer in 0.5 s"),
        (other_grpc, "the server there is not a Ray head"),
    ],
)
def test_what_is_not_ray_is_given_up(listener: Listener, told: str, scheme: str) -> None:
    if listener in (hanging_grpc, other_grpc) and scheme:
        pytest.skip("Ray's own client has a limit, of half a minute")
    with listener() as port, pytest.raises(ConfigError) as caught:
        connect(f"{scheme}127.0.0.1:{port}", num_cpus=1)
    line = str(caught.value)
    assert line.startswith(f"Ray at {scheme}127.0.0.1:{port} cannot be reached: ") and told in line
    assert "\n" not in line


@pytest.mark.parametrize("listener", [hanging_grpc, other_grpc])
def test_whatever_shakes_hands_is_left_to_rays_own_client(listener: Listener) -> None:
    """It talks to a proxy, which is no head. Without the scheme the same server is refused."""
    with listener() as port:
        ray_cluster._probe(f"ray://127.0.0.1:{port}")
        with pytest.raises(OSError, match=r"Ray head|its head did not answer"):
            ray_cluster._probe_one(f"127.0.0.1:{port}")


def test_a_head_that_refuses_is_left_to_ray() -> None:
    with other_grpc(grpc.StatusCode.PERMISSION_DENIED) as port:
        ray_cluster._probe_one(f"127.0.0.1:{port}")
    with other_grpc() as port, pytest.raises(OSError, match="not a Ray head"):
        ray_cluster._probe_one(f"127.0.0.1:{port}")


def test_an_encrypted_connection_begins_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent() as port:
        with pytest.raises(OSError, match="sent nothing"):
            ray_cluster._probe(f"ray://127.0.0.1:{port}")
        monkeypatch.setenv("RAY_USE_TLS", "1")
        ray_cluster._probe(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (
            "http://head:8265",
            "run `ffsplit submit --address http://head:8265 ...`, or give that of its cluster",
        ),
        ("ray://head", "ray://head has no port: give ray://head:10001"),
        ("ray://[::1]", "has no port: give ray://[::1]:10001"),
        ("head", "'head' is not the address of a Ray cluster: give HOST:PORT, such as 127.0.0.1:6379"),
        ("head:port", "is not the address of a Ray cluster"),
        ("ray:", "is not the address of a Ray cluster"),
        ("ray://no-such-host.invalid:10001", "Ray at ray://no-such-host.invalid:10001 cannot be reached: "),
    ],
)
def test_what_is_no_address_is_told_with_what_is_one(address: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(address, num_cpus=1)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_client_whose_cluster_is_gone_is_told_briefly() -> None:
    reason = "Request can't be sent because the Ray client has already been disconnected due to an error"
    said = ray_cluster.refusal("ray://head:10001", reason)
    assert said == "Ray Client answers at ray://head:10001, but not its cluster: see `ray status` on the head"


def test_the_cluster_of_this_machine_is_probed_where_ray_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_token", lambda: False)
    with silent() as port:
        monkeypatch.setattr(ray_cluster, "whole_address", {"auto": f"127.0.0.1:{port}"}.__getitem__)
        with pytest.raises(ConfigError, match=r"of this machine at .* cannot be reached \(it accepts"):
            connect("auto", num_cpus=1)


def test_a_mismatch_without_both_versions_is_told_as_it_is() -> None:
    said = ray_cluster.refusal("head:6379", "Version mismatch: the cluster is odd\nTrace")
    assert said == "Ray at head:6379 cannot be reached: Version mismatch: the cluster is odd"


def test_a_process_that_does_not_leave_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(ray_cluster, "_processes_started_here", lambda: [stuck])
    monkeypatch.setattr(ray_cluster, "LEAVE_WITHIN_S", 0.1)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)
    ray_cluster.disconnect()
    assert stuck.wait(10) == -signal.SIGKILL


def test_a_ray_that_is_interrupted_while_it_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it end processes that are not its own."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = []

    def interrupted(**_: object) -> None:
        started.append(psutil.Popen([*sleep, f"{Path(ray.__file__).parent}/core/src/ray/gcs/gcs_server"]))
        started.append(psutil.Popen(sleep))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_cluster.ray, "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connect("local", num_cpus=1)
    server, other = started
    assert not server.is_running()
    assert other.is_running()
    other.kill()
    other.wait(10)


def test_the_answer_to_sigterm_is_kept_in_the_main_thread_and_left_alone_in_others() -> None:
    def ours(*_: object) -> None:
        raise AssertionError

    def elsewhere() -> str:
        with ray_cluster._own_signals():
            return "done"

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with ray_cluster._own_signals():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is ours
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(elsewhere).result() == "done"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_an_autoscaler_a_cluster_counts_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such interface")

    state = ray_cluster.ray._private.state.state
    node = {"NodeID": "a" * 8, "NodeManagerHostname": "h", "Resources": {"CPU": 5.0}, "Alive": True}
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [node])
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", fail)
    assert ray_cluster.room(Share(2, 0)) == 2
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 8.0})
    assert ray_cluster.room(Share(2, 0)) == 4


def test_nobody_listens() -> None:
    with pytest.raises(ConfigError, match="Connection refused"):
        connect(f"127.0.0.1:{closed_port()}", num_cpus=1)


@pytest.mark.subprocess
def test_without_the_token_that_is_asked_for(tmp_path: Path) -> None:
    """In a process of its own: Ray reads the mode once. Its client would abort."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_TOKEN", None)
    environment.pop("RAY_AUTH_TOKEN_PATH")
    with hanging_grpc() as port:
        code = "from ffsplit.distributed.ray_cluster import connect\n"
        code += "from ffsplit.exit_codes import exit_code_of\n"
        code += f"raise SystemExit(exit_code_of(lambda: connect('127.0.0.1:{port}', num_cpus=1)))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "requires a token, and none is set here: set RAY_AUTH_TOKEN, or the file" in done.stderr


@pytest.mark.parametrize("command", ["compress", "zoo"])
def test_a_command_ends_before_anything_is_written(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = tmp_path / "zoo.yaml"
    file.write_text(f"destination: {tmp_path / 'out'}\nmodels: [{{model: {small_job.model}}}]\n")
    given = small_job.arguments(tmp_path / "out") if command == "compress" else [str(file)]
    with silent() as port:
        assert main([command, *given, "--address", f"127.0.0.1:{port}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ffsplit: Ray at 127.0.0.1") and "sent nothing" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("listener", "told"),
    [
        (silent, "it did not answer within 0.5 s"),
        (web_server, "cannot be reached"),
        (lambda: web_server(b"[1]"), "cannot be reached"),
        (lambda: web_server(b"no", 404), "404"),
    ],
)
def test_what_is_no_job_server_is_given_up(listener: Listener, told: str) -> None:
    with listener() as port, pytest.raises(ConfigError, match=r"^Ray at http://127") as caught:
        JobServer(f"http://127.0.0.1:{port}")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_what_ray_reports_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray prints the loss of a node on stdout, with its logs, where `--json` has a document."""
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    with pytest.raises(ConfigError):
        connect(f"127.0.0.1:{closed_port()}", num_cpus=1)
    said = (
        "Raylet is terminated. Termination is unexpected. Possible reasons include: (1) SIGKILL\n    [state]"
    )
    ray._private.worker.print_to_stdstream({"lines": [said]}, ignore_prefix=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "ray: Raylet is terminated. Termination is unexpected.\n"
