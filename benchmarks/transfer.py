"""Transfers through FFSplit and through bare boto3, in turn, and the list of a thousand runs, on loopback.

    FFSPLIT_TEST_SERVERS=1 python benchmarks/transfer.py --server ceph --size-mb 512

Ours hashes every byte, both ways; bare boto3 does not. Each pair moves the same file, and the ratio is
the median over pairs of boto3's seconds over ours.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from ffsplit.artifacts.commits import Commit
from ffsplit.artifacts.digests import file_entries
from ffsplit.artifacts.index import list_runs
from ffsplit.artifacts.locate import locate
from ffsplit.artifacts.publish import publish_attempt
from ffsplit.artifacts.pull import download, materialize
from ffsplit.artifacts.stores import open_store
from tests.artifacts.attempts import ATTEMPT, make_manifest
from tests.s3 import ceph_server, swift_server

CLASSIC = TransferConfig(preferred_transfer_client="classic")
SERVERS = {"ceph": ceph_server, "swift": swift_server}
BUCKET = "benchmark"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_weights(path: Path, size_mb: int) -> None:
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        for _ in range(size_mb):
            file.write(os.urandom(10**6))


def publish(directory: Path, uri: str, run_key: str) -> None:
    """What `compress` does with a finished checkpoint: hash, write the manifest, upload, commit."""
    (directory / "manifest.json").unlink(missing_ok=True)
    manifest = make_manifest(run_key=run_key, attempt=ATTEMPT, files=file_entries(directory))
    (directory / "manifest.json").write_text(manifest.to_json())
    store = open_store(uri)
    publish_attempt(
        store, run_key=run_key, attempt=ATTEMPT, directory=directory, kind="model", move_latest=True
    )


def paired_transfers(client: Any, folder: Path, *, size_mb: int, num_pairs: int) -> dict[str, list[float]]:
    weights = folder / "attempt" / "model.safetensors"
    write_weights(weights, size_mb)
    uri = f"s3://{BUCKET}/transfer"
    times: dict[str, list[float]] = {name: [] for name in ("boto3 up", "ours up", "boto3 down", "ours down")}
    for pair in range(num_pairs + 1):
        run_key, copy = f"{pair:016x}", folder / "copy"
        bare = folder / "bare"
        works: dict[str, Callable[[], object]] = {
            "boto3 up": lambda: client.upload_file(str(weights), BUCKET, "bare", Config=CLASSIC),
            "ours up": lambda key=run_key: publish(weights.parent, uri, key),
            "boto3 down": lambda path=bare: client.download_file(BUCKET, "bare", str(path), Config=CLASSIC),
            "ours down": lambda key=run_key, path=copy: download(locate(f"{uri}/{key}"), directory=path),
        }
        names = list(works)
        if pair % 2:
            names = [names[1], names[0], names[3], names[2]]
        for name in names:
            spent = seconds(works[name])
            times[name] += [spent] if pair else []  # the first pair warms up
        bare.unlink()
        for path in sorted(copy.rglob("*"), reverse=True):
            path.unlink()
        copy.rmdir()
        open_store(uri).delete_prefix(run_key)
    return times


def cached_pull(folder: Path) -> float:
    uri = f"s3://{BUCKET}/transfer"
    publish(folder / "attempt", uri, "f" * 16)
    materialize(uri, cache=folder / "cache")
    return seconds(lambda: materialize(uri, cache=folder / "cache"))


def listing(num_runs: int) -> tuple[float, float]:
    """Seconds to list runs without an index and with one."""
    store = open_store(f"s3://{BUCKET}/list")

    def put(number: int) -> None:
        run_key = f"{number:016x}"
        data = make_manifest(run_key=run_key, attempt=ATTEMPT).to_json().encode()

        commit = Commit(
            run_key=run_key,
            attempt=ATTEMPT,
            committed_at="2026-01-01T00:00:00+00:00",
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            kind="model",
        )
        store.put_bytes(f"{run_key}/{ATTEMPT}/manifest.json", data)
        store.put_bytes(f"{run_key}/commit.json", commit.model_dump_json().encode())

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(put, range(num_runs)):
            pass

    def check() -> None:
        assert len(list_runs(open_store(store.uri))) == num_runs

    return seconds(check), statistics.median(seconds(check) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", choices=SERVERS, default="ceph")
    parser.add_argument("--size-mb", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1000)
    given = parser.parse_args()
    server, processes = SERVERS[given.server].start()
    os.environ.update(server.environment)
    try:
        client: Any = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
        client.create_bucket(Bucket=BUCKET)
        with tempfile.TemporaryDirectory(prefix="ffsplit-benchmark-") as name:
            folder = Path(name)
            times = paired_transfers(client, folder, size_mb=given.size_mb, num_pairs=given.pairs)
            for way in ("up", "down"):
                pairs = list(zip(times[f"boto3 {way}"], times[f"ours {way}"], strict=True))
                ratio = statistics.median(bare / ours for bare, ours in pairs)
                rates = [given.size_mb / statistics.median(column) for column in zip(*pairs, strict=True)]
                print(f"| {way} | {rates[0]:.0f} MB/s | {rates[1]:.0f} MB/s | {ratio:.2f} |", flush=True)
            print(f"pull of what is cached: {cached_pull(folder):.3f} s", flush=True)
        rebuilt, listed = listing(given.runs)
        print(f"list of {given.runs} runs: {listed:.2f} s; without an index, once: {rebuilt:.1f} s")
    finally:
        processes.stop()


if __name__ == "__main__":
    main()
