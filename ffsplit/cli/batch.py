"""The commands about many models, and about jobs on a cluster that is elsewhere."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from ffsplit import streams
from ffsplit.directories import user_path
from ffsplit.exit_codes import INTERRUPTED

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]
Parse = Callable[[list[str]], argparse.Namespace]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SUBMITTED = ("compress", "calibrate", "zoo", "benchmark", "pull")


def add_batch_commands(command: AddCommand, *, parse: Parse) -> None:
    """`parse` parses a whole command line: what is submitted is checked before it is."""
    zoo = command("zoo", _zoo, "compress every model of a zoo file, and publish what passes its gates")
    add = zoo.add_argument
    add("file", metavar="ZOO.yaml", help="models, recipes, budgets, gates and the destination")
    add("--workers", type=int, metavar="N", help="a model; default: the cluster's share of it")
    add("--address", metavar="RAY", help="a Ray cluster; default: RAY_ADDRESS, or one started on the spot")
    add("--runner", default="ray", choices=("ray", "serial"))
    add("--json", action="store_true", help="print the batch's manifest alone on stdout")
    submit = command("submit", _submit, "run a command as a job of a cluster, follow it, end as it ends")
    submit.set_defaults(parse=parse)
    add = submit.add_argument
    add(
        "--address",
        metavar="URL",
        help=f"of the job server; default: RAY_API_SERVER_ADDRESS, or {DEFAULT_ADDRESS}",
    )
    add("--working-dir", metavar="DIR", help="send this directory along: relative paths are in it")
    add("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job; else it goes on")
    add("command", choices=SUBMITTED)
    add("arguments", nargs=argparse.REMAINDER, help="of the command, whose output must be absolute")


def _submit(parsed: argparse.Namespace) -> int:
    from ffsplit.errors import ConfigError

    working_dir = None if parsed.working_dir is None else user_path(parsed.working_dir)
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working-dir {parsed.working_dir} is not a directory")
    checked = parsed.parse([parsed.command, *parsed.arguments])

    from ffsplit.cli.submission import submit

    return submit(
        parsed.command,
        parsed.arguments,
        checked,
        address=parsed.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS,
        working_dir=working_dir,
        stop_on_interrupt=parsed.stop_on_interrupt,
    )


def _zoo(parsed: argparse.Namespace) -> int:
    from ffsplit.errors import ConfigError
    from ffsplit.zoo.zoo_file import load_zoo

    zoo = load_zoo(parsed.file)
    if parsed.workers is not None and parsed.workers < 1:
        raise ConfigError(f"--workers should be greater than or equal to 1, not {parsed.workers}")
    if parsed.in_job:
        from ffsplit.store.entries import check_absolute

        check_absolute(zoo.destination)

    from ffsplit.zoo.run import run_zoo

    try:
        batch = run_zoo(zoo, address=parsed.address, runner=parsed.runner, workers=parsed.workers)
    except KeyboardInterrupt:
        streams.note("ffsplit: interrupted; what was published stands, the next batch skips it")
        return INTERRUPTED
    if parsed.json:
        print(batch.model_dump_json(indent=2))
    else:
        from ffsplit.cli.tables import print_batch

        print_batch(batch, destination=zoo.destination)
    return batch.exit_code
