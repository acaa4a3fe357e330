"""One run into a bucket, on a Ray of its own with structured logs: what it tells, and what it must not.

`python -m tests.distributed.observed_run FOLDER` prints one JSON object: the counters that
Prometheus would read, the workers' lines by stage, and every file in which a secret was found.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from moto.server import ThreadedMotoServer

import ffsplit
from ffsplit.distributed.ray_runner import RayRunner
from tests.small_jobs import SmallJob
from tests.tiny_models import save_checkpoint

BUCKET = "runs"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
EXPORT_WITHIN_S = 60.0


def start_store() -> Any:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL_S3"] = f"http://{host}:{port}"
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    return client


def counters() -> dict[str, float]:
    """What the node's metrics port says of FFSplit, over all workers and drivers."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if "ffsplit_" in line and not line.startswith("#"):
            name, stage = line.split("{")[0].removeprefix("ray_").removesuffix("_total"), "?"
            if 'stage="' in line or 'Stage="' in line:
                stage = line.lower().split('stage="')[1].split('"')[0]
            key = f"{name} {stage}"
            found[key] = found.get(key, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def exported(wanted: Sequence[str]) -> dict[str, float]:
    """The counters, once they are there."""
    until = time.monotonic() + EXPORT_WITHIN_S
    while True:
        found = counters()
        if all(name in found for name in wanted) or time.monotonic() > until:
            return found
        time.sleep(0.5)


def files_with(secrets: Sequence[str], folder: Path) -> list[str]:
    encoded = [secret.encode() for secret in secrets]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in paths if any(secret in path.read_bytes() for secret in encoded)]


if __name__ == "__main__":
    folder, secrets = Path(sys.argv[1]), [os.environ[name] for name in SECRETS]
    job, client = SmallJob(folder, save_checkpoint(folder / "model", "bert")), start_store()
    with RayRunner(address="local", num_workers=2):
        manifest = ffsplit.compress(job.config(f"s3://{BUCKET}/out", runner="ray", workers=2))
        told = exported([f"ffsplit_{name}" for name in ("tokens calibrate", "bytes compress")])
        session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        jobs = json.dumps(ray._private.state.jobs(), default=str)
    lines = [
        json.loads(line)
        for path in (session / "logs").glob("worker*.err")
        for line in path.read_text("utf-8", "replace").splitlines()
        if line.startswith('{"time"')
    ]
    published = folder / "published"
    for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
        path = published / item["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(BUCKET, item["Key"], str(path))
    print(
        json.dumps(
            {
                "run": manifest.run_key,
                "tokens": manifest.calibration.num_tokens,
                "counters": told,
                "runs": sorted({line["run"] for line in lines}),
                "finished": Counter(line["stage"] for line in lines if line["event"] == "finished"),
                "items": sorted(line["item"] for line in lines if line["event"] == "finished"),
                "leaks": files_with(secrets, session) + files_with(secrets, published),
                "published": len(list(published.rglob("*.json"))),
                "jobs_leak": any(secret in jobs for secret in secrets),
            }
        )
    )
