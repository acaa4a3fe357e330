"""What a published model cost: the seconds that its manifest measured, times the prices that you give.

    python cluster/cost.py s3://example-models/zoo/minilm --head-price H --worker-price W --workers N

H and W are what one head and one worker cost an hour, in any currency. docs: cluster/README.md.
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
    parser.add_argument("--head-price", type=price, required=True, metavar="H", help="of a head, an hour")
    parser.add_argument("--worker-price", type=price, required=True, metavar="W", help="of a worker, an hour")
    parser.add_argument("--workers", type=count, required=True, metavar="N", help="that were up")
    parser.add_argument(
        "--start-s",
        type=price,
        default=0.0,
        metavar="S",
        help="until the cluster was up; default: 0",
    )
    parsed = parser.parse_args(arguments)
    return exit_code_of(lambda: show(parsed))


def show(parsed: argparse.Namespace) -> int:
    manifest = read_manifest(locate(parsed.uri))
    hourly = parsed.head_price + parsed.workers * parsed.worker_price
    start = Stage(name="start", key="", num_items=1, num_reused=0, wall_s=parsed.start_s)
    print(f"{manifest.model.id}, run {manifest.run_key}, {hourly:.2f} an hour")
    total = 0.0
    for stage in (start, *manifest.stages):
        cost = stage.wall_s / 3600 * hourly
        total += cost
        reused = f"  ({stage.num_reused} of {stage.num_items} reused)" if stage.num_reused else ""
        print(f"{stage.name:<12} {stage.wall_s:>10.1f} s {cost:>10.4f}{reused}")
    print(f"{'in all':<12} {parsed.start_s + sum(s.wall_s for s in manifest.stages):>10.1f} s {total:>10.4f}")
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
