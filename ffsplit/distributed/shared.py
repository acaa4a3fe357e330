"""One cluster for several jobs, each of which connects to it from a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from ffsplit.machine import usable_cores


class Cluster(NamedTuple):
    """Where jobs connect to, None without Ray, and how many CPU cores they share."""

    address: str | None
    num_cpus: int


@contextmanager
def share_cluster(address: str | None, *, runner: Literal["ray", "serial"]) -> Iterator[Cluster]:
    """The cluster at an address, or one started on the spot that ends with this context.

    Raises ConfigError when it cannot be reached.
    """
    if runner == "serial":
        yield Cluster(None, usable_cores())
        return
    import ray

    from ffsplit.distributed.ray_runner import RayRunner

    with RayRunner(address=address, num_workers=None) as connected:
        yield Cluster(ray.get_runtime_context().gcs_address, connected.num_workers)
