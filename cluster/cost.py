"""The cost of a published model: the seconds in its manifest times the prices that you give.

    python cluster/cost.py s3://example-models/zoo/minilm --head-price H --worker-price W --workers N

H and W are the prices of one head and one worker per hour, in any currency. See cluster/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ffsplit.exit_codes import DONE, checked_output, exit_code_of
from ffsplit.store.artifact import locate, read_manifest
from ffsplit.store.manifest import Stage


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a published model cost.")
    parser.add_argument("uri", help="where it was published, its /<run key>, or an attempt's directory")
    add = parser.add_argument
    add("--head-price", type=price, required=True, metavar="H", help="price of a head per hour")
    add("--worker-price", type=price, required=True, metavar="W", help="price of a worker per hour")
    add("--workers", type=count, required=True, metavar="N", help="number of workers")
    add("--start-s", type=price, default=0.0, metavar="S", help="seconds to start the cluster; default: 0")
    parsed = parser.parse_args(arguments)
    return exit_code_of(lambda: show(parsed))


def show(parsed: argparse.Namespace) -> int:
    manifest = read_manifest(locate(parsed.uri))
    hourly = parsed.head_price + parsed.workers * parsed.worker_price
    start = Stage(name="start", key="", num_items=1, num_reused=0, wall_s=parsed.start_s)
    print(f"{manifest.model.id}, run {manifest.run_key}, {hourly:.2f} per hour")
    total = 0.0
    for stage in (start, *manifest.stages):
        cost = stage.wall_s / 3600 * hourly
        total += cost
        reused = f"  ({stage.num_reused} of {stage.num_items} reused)" if stage.num_reused else ""
        print(f"{stage.name:<12} {stage.wall_s:>10.1f} s {cost:>10.4f}{reused}")
    print(f"{'total':<12} {parsed.start_s + sum(s.wall_s for s in manifest.stages):>10.1f} s {total:>10.4f}")
    return checked_output(DONE, is_result=True)


def price(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    raise SystemExit(main())
