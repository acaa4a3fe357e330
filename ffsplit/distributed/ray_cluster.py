"""Connects to a Ray cluster, and counts the workers that fit."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import psutil
import ray
from ray.exceptions import RpcError

from ffsplit import logs, streams
from ffsplit.compat.ray import (
    NotAHead,
    ask_head,
    autoscaler_limit,
    find_token,
    raylet_socket,
    raylets_started_here,
    redirect_messages,
    whole_address,
)
from ffsplit.directories import lend_ray_token
from ffsplit.errors import ConfigError, reason_of
from ffsplit.interrupts import uninterrupted
from ffsplit.machine import usable_cores

LOCAL_OBJECT_STORE_BYTES = 200 * 2**20
"""Enough for a local cluster: tensors never pass through the object store."""
CONNECT_WITHIN_S = 10.0
"""Timeout for a host to accept a connection."""
ANSWER_WITHIN_S = 30.0
"""Timeout for a head node to answer."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The start of a gRPC connection and empty settings. The other side answers with its own settings."""
SETTINGS = 4
NODE_WITHIN_S = 20.0
"""How long a node of the cluster on this machine, which may be starting, may take to appear."""
NOT_A_HEAD = "the server there is not a Ray head (its default port is 6379)"
LEAVE_WITHIN_S = 3.0
"""Timeout for the workers of a stopped local cluster to exit by themselves."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""The label that Ray gives a node with GPUs, such as H100."""
CLIENT_SCHEME = "ray://"
_ADDRESS = re.compile(r"(ray://)?[^/\s]+:\d+")
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


class Host(NamedTuple):
    """A live node of the cluster, its total resources, and its kind of GPU, by its label."""

    id: str
    name: str
    resources: Mapping[str, float]
    accelerator: str | None = None


@dataclass(frozen=True)
class Share:
    """The resources of one worker. `gpus` below 1 shares one GPU; above 1 it must be a whole number.

    With `accelerator`, only nodes with this label count.
    """

    cpus: int
    gpus: float
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ConfigError(f"--gpus-per-worker {self.gpus:g}: give a fraction of one GPU, or whole GPUs")

    def fits(self, resources: Mapping[str, float]) -> int:
        """Number of workers that fit on one host."""
        room = int(resources.get("CPU", 0)) // self.cpus
        if self.gpus == 0:
            return room
        gpus = int(resources.get("GPU", 0))
        return min(room, gpus * int(1 / self.gpus + 1e-9) if self.gpus <= 1 else gpus // int(self.gpus))


def connect(address: str | None, *, num_cpus: int) -> None:
    """Connect this process to the cluster at an address, or start a local one with `num_cpus` CPUs.

    Raises ConfigError if there is none, or if it runs another version of Ray or Python.
    """
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address in (None, "local"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        lend_ray_token()
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
    else:
        options["address"] = address
    redirect_messages(_report)
    logging.getLogger("ray.util.client").setLevel(logging.CRITICAL)
    try:
        _probe(options["address"])
        with _own_signals(), _whole_or_ended():
            ray.init(**options)
    except ConfigError:
        raise
    except Exception as error:  # Ray raises about 20 types, plain Exception among them
        raise ConfigError(refusal(options["address"], str(error).strip() or type(error).__name__)) from None


def _report(message: str) -> None:
    """Print the first line on stderr: stdout is for results, and Ray appends twenty lines of its logs."""
    line = message.strip().partition("\n")[0].partition(" Possible reasons")[0]
    if logs.asked_for() == "json":
        logs.log("ray", message=line)
    else:
        streams.note(f"ray: {line}")


@contextmanager
def _whole_or_ended() -> Iterator[None]:
    """End the processes of a Ray that does not start.

    An interrupt may come when the first of them run, and Ray does not know them yet.
    """
    here, others = psutil.Process(), set(psutil.Process().children())
    try:
        yield
    except BaseException:
        disconnect()
        _end([each for each in here.children(recursive=True) if each not in others and _is_of_ray(each)])
        raise


def _is_of_ray(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(os.path.dirname(ray.__file__) in argument for argument in process.cmdline())
    return False


def disconnect() -> None:
    """Disconnect. On return, all processes of a local cluster have exited."""
    with uninterrupted():
        started_here = _processes_started_here()
        with suppress(Exception):  # the run's own outcome matters more
            ray.shutdown()
        _, late = psutil.wait_procs(started_here, timeout=LEAVE_WITHIN_S)
        _end(late)


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=LEAVE_WITHIN_S)


def _processes_started_here() -> list[psutil.Process]:
    """Workers and agents below the raylet of a local cluster. Those of other clusters are not included."""
    found = []
    for raylet in raylets_started_here():
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(raylet).children(recursive=True)
    return found


def token_problem(address: str) -> str:
    """Why a cluster that requires a token cannot be used, and the two ways to provide one."""
    ways = "set RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names (default: ~/.ray/auth_token)"
    if not find_token():
        return f"Ray at {address} requires a token, and none is set here: {ways}"
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        return f"Ray at {address} requires a token, but RAY_AUTH_MODE={mode} disables it: unset it"
    return f"Ray at {address} rejects the token that is set here: {ways}"


def refusal(address: str, reason: str) -> str:
    """Why a cluster cannot be used, in one line."""
    if any(sign in reason for sign in ("InvalidAuthToken", "no authentication token was found")):
        return token_problem(address)
    if "ersion mismatch" in reason:
        found = _VERSIONS.findall(reason)
        if len(found) == 2:
            theirs, ours = (f"Ray {version} on Python {python}" for version, python in found)
            return (
                f"the cluster at {address} runs {theirs}, this machine {ours}: install the same versions here"
            )
    if address.startswith(CLIENT_SCHEME) and "Ray client has already been disconnected" in reason:
        return f"Ray Client answers at {address}, but not its cluster: see `ray status` on the head"
    what = "Ray could not be started here" if address == "local" else f"Ray at {address} cannot be reached"
    return f"{what}: {reason.splitlines()[0]}"


def _probe(address: str) -> None:
    """Raise OSError unless a Ray head answers at an address. Ray itself would retry for ever.

    The port may be closed, the host silent, or the server not a working head: a web server, another service,
    or a head that hangs. Ray replaces a loopback address by this host's own.
    """
    if address == "local":
        return
    _check_form(address)
    find_token()
    if address == "auto":
        _probe_auto()
        return
    addresses = [address] if "://" in address else [address, whole_address(address)]
    for each in dict.fromkeys(addresses):
        _probe_one(each)


def _check_form(address: str) -> None:
    """Raise ConfigError for what is not the address of a cluster."""
    scheme, separator, host = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ConfigError(
            f"{address} is the address of a job server: run `ffsplit submit --address {address} ...`, or "
            f"give that of its cluster, such as {urlsplit(address).hostname}:6379"
        )
    if scheme == "ray" and ":" not in host.rpartition("]")[2]:
        raise ConfigError(f"{address} has no port: give {CLIENT_SCHEME}{host or 'HOST'}:10001")
    if not separator and address != "auto" and not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"{address!r} is not the address of a Ray cluster: give HOST:PORT, such as 127.0.0.1:6379, "
            "ray://HOST:10001, or auto for the Ray on this machine"
        )


def _probe_auto() -> None:
    """Probe the cluster of this machine, which Ray finds by its processes or by a file that it left."""
    try:
        found = whole_address("auto")
    except ConnectionError:
        raise ConfigError(
            "address auto: no Ray runs on this machine: start it with `ray start --head`, give the address "
            "of a cluster, or unset RAY_ADDRESS for a Ray of this command's own"
        ) from None
    try:
        _probe_one(found)
    except OSError as error:
        raise ConfigError(
            f"address auto: the Ray of this machine at {found} cannot be reached ({reason_of(error)}): run "
            "`ray stop`, which removes what a Ray that was killed has left, then `ray start --head`"
        ) from None


def _probe_one(address: str) -> None:
    scheme, _, host_port = address.rpartition("://")
    host, separator, port = host_port.rpartition(":")
    if not separator or not port.isdigit():
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
            _check_speaks_grpc(connection)
    if not scheme and _check_answers(host_port):
        _check_node_here(host_port)


def _check_speaks_grpc(connection: socket.socket) -> None:
    connection.settimeout(ANSWER_WITHIN_S)
    try:
        connection.sendall(HTTP2_PREFACE)
        header = b""
        while len(header) < 9 and (received := connection.recv(9 - len(header))):
            header += received
    except TimeoutError:
        raise OSError(f"it accepts connections but sent nothing in {ANSWER_WITHIN_S:g} s") from None
    if header[3:4] != bytes([SETTINGS]):
        raise OSError(NOT_A_HEAD)


def _check_answers(address: str) -> bool:
    """Check that a head answers. Returns False if it refuses this process: ray.init explains why."""
    try:
        ask_head(address, within_s=ANSWER_WITHIN_S)
        return True
    except NotAHead:
        raise OSError(NOT_A_HEAD) from None
    except RpcError as error:
        if any(sign in str(error) for sign in ("Deadline Exceeded", "Timed out")):
            raise OSError(f"its head did not answer in {ANSWER_WITHIN_S:g} s") from None
        return False


def _check_node_here(address: str) -> None:
    """Check that the cluster has a working node on this machine. Without one, Ray's own code would abort."""
    path = raylet_socket(address, within_s=NODE_WITHIN_S)
    if path is None:
        host = address.rpartition(":")[0]
        raise ConfigError(
            f"Ray at {address} has no node on this machine: run `ray start --address={address}` here, or use "
            f"--address ray://{host}:10001, or `ffsplit submit`"
        )
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(CONNECT_WITHIN_S)
            connection.connect(path.removeprefix("unix://"))
    except OSError as error:
        raise ConfigError(
            f"Ray at {address}: its node on this machine cannot be reached, {path}: {reason_of(error)}; if "
            "its session directory was cleaned away, run `ray stop` and `ray start` here again"
        ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's SIGTERM handler, if it has one: ray.init would replace it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        ours = callable(before) and threading.current_thread() is threading.main_thread()
        if ours:
            signal.signal(signal.SIGTERM, before)


def hosts(share: Share) -> list[Host]:
    """The nodes that are large enough for at least one worker, in a fixed order."""
    alive = [
        Host(
            node["NodeID"],
            f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}",
            node["Resources"],
            node.get("Labels", {}).get(ACCELERATOR_LABEL),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    found = [each for each in alive if share.accelerator in (None, each.accelerator)]
    return sorted((each for each in found if share.fits(each.resources)), key=lambda each: each.id)


def one_kind(share: Share) -> str | None:
    """The kind of GPU to time on where the cluster has several: that of most workers. None for one kind.

    It depends on nothing but the nodes, so that all timings in a cluster are on the same kind.
    """
    rooms: Counter[str | None] = Counter()
    for host in hosts(share):
        rooms[host.accelerator] += share.fits(host.resources)
    kinds = [kind for kind in rooms if kind is not None]
    return max(kinds, key=lambda kind: (rooms[kind], kind)) if len(rooms) > 1 and kinds else None


def selector(accelerator: str | None) -> dict[str, Any]:
    """The options of a task or an actor that keep it on nodes with one kind of GPU."""
    return {} if accelerator is None else {"label_selector": {ACCELERATOR_LABEL: accelerator}}


def room(share: Share) -> int:
    """Number of workers that the cluster can run, including nodes that its autoscaler may add."""
    placed = sum(share.fits(host.resources) for host in hosts(share))
    scaled = autoscaler_limit()
    return max(placed, share.fits(scaled)) if scaled else placed


def check_room(share: Share) -> None:
    """Raise ConfigError if no worker fits: the run would wait for ever."""
    if share.accelerator is not None and not hosts(share) and not autoscaler_limit():
        known = sorted({host.accelerator for host in hosts(Share(1, 0)) if host.accelerator})
        raise ConfigError(
            f"--accelerator-type {share.accelerator}: no node of the cluster with room for a worker has the "
            f"label {ACCELERATOR_LABEL}={share.accelerator} ({'its nodes have ' if known else 'none has one'}"
            f"{', '.join(known)})"
        )
    if room(share):
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = {kind: max((each.get(kind, 0) for each in nodes), default=0) for kind in ("CPU", "GPU")}
    if share.gpus:
        asked = f"--gpus-per-worker {share.gpus:g} on {share.cpus} CPUs"
    else:
        asked = f"a worker of {share.cpus} CPUs"
    raise ConfigError(
        f"{asked}: no node of the cluster has that much; "
        f"its largest nodes have {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs"
    )


# One cluster for several jobs. Each connects to it from its own process.


class Cluster(NamedTuple):
    """The address that jobs connect to (None without Ray), and how many CPU cores they share."""

    address: str | None
    num_cpus: int


@contextmanager
def share_cluster(address: str | None, *, runner: Literal["ray", "serial"]) -> Iterator[Cluster]:
    """The cluster at an address, or a new local one that ends with this context.

    Raises ConfigError if it cannot be reached.
    """
    if runner == "serial":
        yield Cluster(None, usable_cores())
        return
    from ffsplit.distributed.ray_runner import RayRunner

    with RayRunner(address=address, num_workers=None) as connected:
        yield Cluster(connected.address, connected.num_workers)
