"""A cluster with two kinds of GPU, and where work runs in it.

`python -m tests.distributed.labelled_nodes` must run with a network and processes of its own. It prints one
JSON object: the kinds of GPU by what ran. The GPUs are only said to be there: nothing uses them.
"""

from __future__ import annotations

import json
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ffsplit.distributed.ray_cluster import ACCELERATOR_LABEL, Share, one_kind
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.errors import ConfigError

STORE_BYTES = 80_000_000


def kind_here(item: int = 0) -> str:
    """The kind of GPU of this process's node."""
    time.sleep(0.2)
    here = ray.get_runtime_context().get_node_id()
    (labels,) = (node["Labels"] for node in ray.nodes() if node["NodeID"] == here)
    return str(labels.get(ACCELERATOR_LABEL))


def kinds(address: str, **options: Any) -> dict[str, list[str]]:
    """Where each sort of work runs."""
    with RayRunner(address=address, num_workers=None, gpus_per_worker=1, **options) as runner:
        found = {
            "tasks": {answer for _, answer in runner.map_tasks("t", kind_here, range(12))},
            "workers": {answer for _, answer in runner.map_workers("w", lambda: kind_here, range(12))},
            "timed": {runner.run_alone("m", kind_here, 0, reserved=True) for _ in range(4)},
            "hosts": set(runner.on_every_host("h", kind_here, 0).values()),
        }
        return {name: sorted(each) for name, each in found.items()}


def main() -> dict[str, Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for kind, num_gpus in (("A10G", 1), ("H100", 1), ("H100", 2)):
        labels = {ACCELERATOR_LABEL: kind}
        cluster.add_node(num_cpus=4, num_gpus=num_gpus, labels=labels, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    found: dict[str, Any] = {"any": kinds(cluster.address)}
    for kind in ("A10G", "H100"):
        found[kind] = kinds(cluster.address, accelerator_type=kind)
        with RayRunner(address=cluster.address, num_workers=None, accelerator_type=kind) as runner:
            found[kind]["together"] = [runner.run_together("heal", kind_here, 0, size=2)]
    try:
        kinds(cluster.address, accelerator_type="H200")
    except ConfigError as error:
        found["unknown"] = str(error)
    ray.init(address=cluster.address)
    found["one kind"] = [one_kind(Share(1, 1)), one_kind(Share(1, 1, "A10G")), one_kind(Share(1, 2))]
    ray.shutdown()
    cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
