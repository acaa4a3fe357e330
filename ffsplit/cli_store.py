"""The commands that look after published artifacts. None of them imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


def add_store_commands(command: AddCommand) -> None:
    pull = command("pull", _pull, "bring an artifact to this machine, every byte verified")
    pull.add_argument("uri", help="where runs were published, a run or an attempt")
    pull.add_argument(
        "directory", nargs="?", metavar="DIR", help="default: the cache, whose directory is printed"
    )


def _pull(parsed: argparse.Namespace) -> int:
    from ffsplit.artifacts.pull import pull
    from ffsplit.progress_bytes import bytes_to_stderr

    directory = None if parsed.directory is None else Path(parsed.directory).expanduser()
    with bytes_to_stderr("pull") as shown:
        print(pull(parsed.uri, directory, progress=shown))
    return 0
