"""Two hosts that do not see the same files: a cluster whose second node has mounts of its own.

`python -m tests.faults.hosts FOLDER` must run with a network, mounts and processes of its own, which end
with it. It prints one JSON object: how a run with a local --out ended, how one into a bucket did, and
where late work ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from moto.server import ThreadedMotoServer

import ffsplit
from ffsplit.distributed.ray_runner import RayRunner
from ffsplit.errors import FFSplitError
from tests.small_jobs import SmallJob
from tests.tiny_models import save_checkpoint

BUCKET = "runs"
PORT = 26401


class WhereAmI:
    """A worker that takes a moment and says which node it is on."""

    def __call__(self, item: int) -> str:
        time.sleep(0.3)
        return str(ray.get_runtime_context().get_node_id())


def start_node(*arguments: str, hidden: Path | None = None) -> None:
    """A node; with `hidden`, one for which that folder is empty."""
    command = ["ray", "start", *arguments, "--object-store-memory", "80000000", "--disable-usage-stats"]
    if hidden is not None:
        hide = f'mount -t tmpfs none {hidden}; exec "$@"'
        command = ["unshare", "-m", "bash", "-c", hide, "bash", *command]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_store() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=26402, verbose=False)
    server.start()
    settings = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:26402", "AWS_EC2_METADATA_DISABLED": "true"}
    settings |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    os.environ.update(settings)
    import boto3

    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)


def attempt(config: ffsplit.JobConfig) -> str:
    """ "done", or what the run was refused with."""
    try:
        ffsplit.compress(config)
    except FFSplitError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def late_nodes() -> dict[str, int]:
    """How many items each node did of a stage that was under way when the second node joined."""
    counts: dict[str, int] = {}
    with RayRunner(address=None, num_workers=None) as runner:
        for index, (_, node) in enumerate(runner.map_workers("late", WhereAmI, list(range(60)))):
            counts[node] = counts.get(node, 0) + 1
            if index == 2:
                start_node("--address", f"127.0.0.1:{PORT}", "--num-cpus", "1", hidden=HIDDEN)
    return counts


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    HIDDEN = folder / "local"
    HIDDEN.mkdir()
    job = SmallJob(folder, save_checkpoint(HIDDEN / "model", "bert"))
    start_store()
    start_node("--head", "--port", str(PORT), "--num-cpus", "1", "--include-dashboard", "false")
    ray.init(address=f"127.0.0.1:{PORT}", log_to_driver=False)
    try:
        found: dict[str, Any] = {"late": late_nodes()}
        shared = {"runner": "ray", "model": str(HIDDEN / "model")}
        found["local"] = attempt(job.config(HIDDEN / "out", **shared))
        found["left"] = sorted(str(path) for path in HIDDEN.rglob("seen-by-all*"))
        found["shared"] = attempt(job.config(folder / "out", **shared))
        found["bucket"] = attempt(job.config(f"s3://{BUCKET}/out", **shared))
        print(json.dumps(found))
    finally:
        ray.shutdown()
