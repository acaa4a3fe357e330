"""Private interfaces of Ray. Known for 2.50 to 2.60."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address, get_node_to_connect_for_driver
from ray._raylet import (  # type: ignore[attr-defined]
    GRPC_STATUS_CODE_UNIMPLEMENTED,
    IMPLICIT_RESOURCE_PREFIX,
    AuthenticationTokenLoader,
    GcsClient,
    InnerGcsClient,
)
from ray.exceptions import AuthenticationError, RpcError

EVERY_NODE_HAS = str(IMPLICIT_RESOURCE_PREFIX)
"""Every node has 1 of each resource whose name has this prefix, without declaring it."""


class NotAHead(Exception):
    """The server that answered speaks gRPC, but is not the head of a cluster."""


def find_token() -> bool:
    """Whether there is a token. Ray then sends it to every cluster, unless RAY_AUTH_MODE says otherwise.

    That is what `ray.init(address="auto")` does.
    """
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH names no file, or an empty one
        return False


def whole_address(address: str) -> str:
    """An address as Ray resolves it: host and port."""
    return str(canonicalize_bootstrap_address(address))


def ask_head(address: str, *, within_s: float) -> None:
    """Ask a head which cluster it is the head of. Raises NotAHead, or RpcError as Ray does."""
    ensure_token_if_auth_enabled(None, create_token_if_missing=False)  # without a token Ray's client aborts
    try:
        InnerGcsClient.standalone(address, None, int(within_s * 1000))
    except RpcError as error:
        if error.rpc_code == GRPC_STATUS_CODE_UNIMPLEMENTED:
            raise NotAHead(address) from None
        raise


def raylet_socket(address: str, *, within_s: float) -> str | None:
    """The socket of the node that a driver on this machine would connect to; None without such a node."""
    try:
        node = get_node_to_connect_for_driver(GcsClient(address=address), timeout_seconds=int(within_s))
    except RuntimeError:  # no raylet of this cluster runs here
        return None
    return str(node.raylet_socket_name)


def raylets_started_here() -> list[int]:
    """Process ids of the raylets of a cluster that this process started."""
    node = ray._private.worker._global_node
    return [raylet.process.pid for raylet in node.all_processes.get("raylet", [])] if node else []


def redirect_messages(tell: Callable[[str], object]) -> None:
    """Give what Ray reports, such as the loss of a node, to a function. Ray prints it on stdout."""

    def told(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        for message in data["lines"]:
            tell(str(message))

    ray._private.worker.print_to_stdstream = told


def autoscaler_limit() -> Mapping[str, float]:
    """The resources that the cluster may grow to; empty if no autoscaler states them."""
    with suppress(Exception):  # without an autoscaler the cluster keeps its size
        return ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {}


def server_version(client: Any) -> str | None:
    """The version of Ray behind a JobSubmissionClient."""
    version: str | None = getattr(client, "_server_ray_version", None)
    return version


def causes_of(error: Any) -> Iterator[BaseException]:
    """An error of Ray Train and the errors it wraps, the outermost first."""
    while error is not None:
        yield error
        error = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
