"""Transfers through FFSplit and through bare boto3, in turn, and the list of a thousand runs, on loopback.

    python benchmarks/transfer.py --server ceph --sizes-mb 64 256 1024 --pairs 7

Ours hashes every byte, both ways; bare boto3's classic transfer of the same file hashes for no manifest. A
ratio is the median over pairs of boto3's seconds over ours. `whole` is what a user waits for: publishing
hashes, sends, writes the manifest, commits and mends index and hint; a pull finds the run, its manifest and
every byte of it. `bytes alone` leaves all but the file and its sha256 out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from ffsplit.store.artifact import locate
from ffsplit.store.commits import Commit, list_runs
from ffsplit.store.entries import file_entry, sha256_file
from ffsplit.store.publish import Upload
from ffsplit.store.pull import download, materialize
from ffsplit.store.store import open_store
from ffsplit.store.transfer import Transfer
from tests.s3 import ceph_server, swift_server
from tests.s3.loopback import Processes
from tests.store.attempts import ATTEMPT, make_manifest, publish

CLASSIC = TransferConfig(preferred_transfer_client="classic")
SERVERS = {"ceph": ceph_server, "swift": swift_server}
BUCKET = "benchmark"
WEIGHTS = "model.safetensors"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def publish_attempt(directory: Path, uri: str, run_key: str) -> None:
    """What `compress` does with a finished checkpoint."""
    (directory / "manifest.json").unlink(missing_ok=True)
    with Upload(open_store(uri), run_key=run_key, attempt=ATTEMPT) as upload:
        manifest = make_manifest(run_key=run_key, attempt=ATTEMPT, files=upload.add(directory))
        (directory / "manifest.json").write_text(manifest.to_json())
        upload.commit(directory, kind="model", move_latest=True)


class Pairs:
    """The same bytes, up and down, in turn through both."""

    def __init__(self, client: Any, folder: Path, *, size_mb: int) -> None:
        self.client, self.folder, self.size_mb = client, folder, size_mb
        self.weights = folder / "attempt" / WEIGHTS
        self.weights.parent.mkdir(parents=True)
        with self.weights.open("wb") as file:
            for _ in range(size_mb):
                file.write(os.urandom(10**6))
        self.entry = file_entry(self.weights, WEIGHTS)
        self.uri = f"s3://{BUCKET}/transfer"
        self.store = open_store(self.uri)

    def boto3_up(self) -> None:
        self.client.upload_file(str(self.weights), BUCKET, "bare", Config=CLASSIC)

    def boto3_down(self) -> None:
        self.client.download_file(BUCKET, "bare", str(self.folder / "bare"), Config=CLASSIC)

    def whole_up(self) -> None:
        self.run_key = uuid4().hex[:16]
        publish_attempt(self.weights.parent, self.uri, self.run_key)

    def whole_down(self) -> None:
        download(locate(f"{self.uri}/{self.run_key}"), directory=self.folder / "copy")

    def bytes_up(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(sha256_file, self.weights)
            self.store.put_file(f"alone/{WEIGHTS}", self.weights)
        assert digest.result() == self.entry.sha256

    def bytes_down(self) -> None:
        (self.folder / "staging").mkdir()
        staging = self.folder / "staging"
        Transfer(self.store, prefix="alone/", entries=[self.entry], staging=staging, label="alone").run()

    def measure(self, num_pairs: int, *, between: Callable[[], None]) -> dict[str, list[float]]:
        works = (
            self.boto3_up,
            self.whole_up,
            self.bytes_up,
            self.boto3_down,
            self.whole_down,
            self.bytes_down,
        )
        times: dict[str, list[float]] = {work.__name__: [] for work in works}
        for pair in range(num_pairs + 1):
            up, down = works[:3], works[3:]
            turn = pair % 3
            for work in (*up[turn:], *up[:turn], *down[turn:], *down[:turn]):
                spent = seconds(work)
                times[work.__name__] += [spent] if pair else []  # the first pair warms up
            for name in ("copy", "staging"):
                shutil.rmtree(self.folder / name)
            (self.folder / "bare").unlink()
            for prefix in ("alone", self.run_key):
                self.store.delete_prefix(prefix)
            between()
        return times


def rows(times: dict[str, list[float]], size_mb: int) -> list[str]:
    """A row of the table for each way."""
    found = []
    for way in ("up", "down"):
        bare = times[f"boto3_{way}"]
        cells = [f"{size_mb} MB {way}", f"{size_mb / statistics.median(bare):.0f} MB/s"]
        for kind in ("whole", "bytes"):
            ours = times[f"{kind}_{way}"]
            ratios = sorted(b / o for b, o in zip(bare, ours, strict=True))
            cells.append(f"{size_mb / statistics.median(ours):.0f} MB/s")
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        found.append("| " + " | ".join(cells) + " |")
    return found


def forget_deleted(processes: Processes, server: str) -> None:
    """Ceph keeps what was deleted for two hours, and here all of it is memory."""
    if server == "ceph":
        admin = ceph_server.installed() / "usr" / "bin" / "radosgw-admin"
        processes.run([str(admin), "gc", "process", "--include-all"])


def cached_pull(folder: Path) -> float:
    uri = f"s3://{BUCKET}/cached"
    publish(open_store(uri), folder / "small")
    materialize(uri, cache=folder / "cache")
    return statistics.median(seconds(lambda: materialize(uri, cache=folder / "cache")) for _ in range(5))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", choices=SERVERS, default="ceph")
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--runs", type=int, default=1000)
    given = parser.parse_args()
    server, processes = SERVERS[given.server].start()
    os.environ.update(server.environment)
    try:
        client: Any = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
        client.create_bucket(Bucket=BUCKET)
        print("| | boto3 | whole | ratio | bytes alone | ratio |\n|---|---|---|---|---|---|", flush=True)
        for size_mb in given.sizes_mb:
            with tempfile.TemporaryDirectory(prefix="ffsplit-benchmark-") as name:
                pairs = Pairs(client, Path(name), size_mb=size_mb)
                times = pairs.measure(given.pairs, between=lambda: forget_deleted(processes, given.server))
                print("\n".join(rows(times, size_mb)), flush=True)
        with tempfile.TemporaryDirectory(prefix="ffsplit-benchmark-") as name:
            print(f"\npull of what is cached: {cached_pull(Path(name)):.3f} s", flush=True)
        rebuilt, listed = listing(given.runs)
        print(f"list of {given.runs} runs: {listed:.2f} s; without an index, once: {rebuilt:.1f} s")
        print(f"load average: {os.getloadavg()[0]:.1f}")
    finally:
        processes.stop()


if __name__ == "__main__":
    main()
