"""The commands that look after published artifacts. None of them imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ffsplit.directories import user_path

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


def add_store_commands(command: AddCommand) -> None:
    pull = command("pull", _pull, "bring an artifact to this machine, every byte verified")
    pull.add_argument("uri", help="where runs were published, a run, an attempt, or a link of `share`")
    pull.add_argument(
        "directory", nargs="?", metavar="DIR", help="default: the cache, whose directory is printed"
    )
    pull.add_argument("--verify-key", metavar="KEY", help="refuse what this public key's owner did not sign")
    share = command("share", _share, "make a link by which an artifact is pulled without credentials")
    share.add_argument("uri", help="where runs were published, a run or an attempt, in s3://")
    share.add_argument("--expires", default="1h", metavar="T", help="90s, 30m, 12h or 7d; default: 1h")
    listing = command("list", _list, "show what is committed in a store")
    listing.add_argument("uri", help="where runs were published")
    listing.add_argument("--json", action="store_true", help="one JSON array on stdout")
    pin = command("pin", _pin, "keep a run from being collected")
    pin.add_argument("uri", help="a run; where runs were published: the newest model")
    pin.add_argument("--remove", action="store_true", help="let it go again")
    gc = command("gc", _gc, "remove old runs and what broken ones left; without --delete only say what")
    gc.add_argument("uri", help="where runs were published")
    gc.add_argument(
        "--keep-last", type=int, required=True, metavar="N", help="models, and statistics, to keep"
    )
    gc.add_argument(
        "--min-age", default="1d", metavar="T", help="spare younger attempts without a commit; default: 1d"
    )
    gc.add_argument("--delete", action="store_true", help="do it; the default is a dry run")


def _pull(parsed: argparse.Namespace) -> int:
    from ffsplit.progress import bytes_to_stderr
    from ffsplit.store.pull import pull

    directory = None if parsed.directory is None else user_path(parsed.directory)
    with bytes_to_stderr("pull") as shown:
        key = None if parsed.verify_key is None else user_path(parsed.verify_key)
        print(pull(parsed.uri, directory, verify_key=key, progress=shown))
    return 0


def _share(parsed: argparse.Namespace) -> int:
    from ffsplit.config import parse_span
    from ffsplit.redaction import print_credential
    from ffsplit.store.links import share

    print_credential(share(parsed.uri, expires=parse_span(parsed.expires, name="--expires")))
    return 0


def _list(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.tables import list_to_json, print_list
    from ffsplit.store.store import open_store

    store = open_store(parsed.uri)
    if parsed.json:
        print(list_to_json(store))
    else:
        print_list(store)
    return 0


def _pin(parsed: argparse.Namespace) -> int:
    from ffsplit.store.gc import pin, unpin
    from ffsplit.store.locate import locate

    location = locate(parsed.uri)
    done = f"{unpin(location)} is no longer pinned" if parsed.remove else f"{pin(location)} is pinned"
    print(done)
    return 0


def _gc(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.tables import print_plan
    from ffsplit.config import parse_span
    from ffsplit.store.gc import collect, plan
    from ffsplit.store.store import open_store

    store = open_store(parsed.uri)
    planned = plan(store, keep_last=parsed.keep_last, min_age=parse_span(parsed.min_age, name="--min-age"))
    removed = collect(store, planned) if parsed.delete else None
    print_plan(planned, removed=removed)
    return 0
