"""The commands about many models, and about jobs on a cluster that is elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ffsplit.exit_codes import INTERRUPTED

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


def add_batch_commands(command: AddCommand) -> None:
    zoo = command("zoo", _zoo, "compress every model of a zoo file, and publish what passes its gates")
    add = zoo.add_argument
    add("file", metavar="ZOO.yaml", help="models, recipes, budgets, gates and the destination")
    add("--workers", type=int, metavar="N", help="a model; default: the cluster's share of it")
    add("--address", metavar="RAY", help="a Ray cluster; default: RAY_ADDRESS, or one started on the spot")
    add("--runner", default="ray", choices=("ray", "serial"))
    add("--json", action="store_true", help="print the batch's manifest alone on stdout")


def _zoo(parsed: argparse.Namespace) -> int:
    from ffsplit.errors import ConfigError
    from ffsplit.zoo.zoo_file import load_zoo

    zoo = load_zoo(parsed.file)
    if parsed.workers is not None and parsed.workers < 1:
        raise ConfigError(f"--workers should be greater than or equal to 1, not {parsed.workers}")
    if parsed.in_job:
        from ffsplit.artifacts.paths import check_absolute

        check_absolute(zoo.destination)

    from ffsplit.zoo.run import run_zoo

    try:
        batch = run_zoo(zoo, address=parsed.address, runner=parsed.runner, workers=parsed.workers)
    except KeyboardInterrupt:
        print("ffsplit: interrupted; what was published stands, the next batch skips it", file=sys.stderr)
        return INTERRUPTED
    if parsed.json:
        print(batch.model_dump_json(indent=2))
    else:
        from ffsplit.zoo.table import print_batch

        print_batch(batch)
    return batch.exit_code
