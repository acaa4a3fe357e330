"""A cluster of several nodes on one machine, whose nodes may be killed."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

NUM_NODES = 2
QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
STORE_BYTES = 80_000_000


@dataclass
class Nodes:
    """A head without CPUs, where the drivers are, and nodes of one CPU, of which dead ones are replaced."""

    cluster: Cluster
    number: int = NUM_NODES

    @classmethod
    def start(cls, number: int = NUM_NODES) -> Nodes:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": QUICK})
        nodes = cls(cluster, number)
        nodes.replace_dead()
        return nodes

    @property
    def logs(self) -> Path:
        """Where workers of all nodes write."""
        return Path(self.cluster.head_node.get_logs_dir_path())

    def replace_dead(self) -> None:
        for node in list(self.cluster.worker_nodes):
            if not self._raylets(node):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < self.number:
            self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def take_away(self, generator: random.Random) -> None:
        """Kill the raylet of a node, and with it all that runs there."""
        alive = [each for node in list(self.cluster.worker_nodes) for each in self._raylets(node)]
        if alive:
            generator.choice(alive).kill()

    def raylet_of(self, pid: int | None) -> int:
        """The raylet that a worker belongs to, any node's when there is no worker, or no longer."""
        raylets = [int(each.pid) for node in list(self.cluster.worker_nodes) for each in self._raylets(node)]
        if pid is not None:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid).ppid()
                return parent if parent in raylets else raylets[0]
        return raylets[0]

    def _raylets(self, node: Any) -> list[Any]:
        """The process of a node, if it lives."""
        processes = [each.process for each in node.all_processes.get("raylet", [])]
        return [process for process in processes if process.poll() is None]
