"""What the commands do that fetch, list, name, share and remove runs of a store."""

from __future__ import annotations

import argparse

from ffsplit.config import parse_span
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError
from ffsplit.exit_codes import DONE


def pull(parsed: argparse.Namespace) -> int:
    from ffsplit.progress import bytes_to_stderr
    from ffsplit.store.pull import pull

    directory = None if parsed.directory is None else user_path(parsed.directory)
    with bytes_to_stderr("pull") as shown:
        key = None if parsed.verify_key is None else user_path(parsed.verify_key)
        print(pull(parsed.uri, directory, verify_key=key, progress=shown))
    return DONE


def push(parsed: argparse.Namespace) -> int:
    from ffsplit.store.push import push

    print(push(parsed.uri, parsed.repo, public=parsed.public))
    return DONE


def share(parsed: argparse.Namespace) -> int:
    from ffsplit.redaction import print_credential
    from ffsplit.store.links import share

    print_credential(share(parsed.uri, expires=parse_span(parsed.expires, name="--expires")))
    return DONE


def list_runs(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.alias_lines import history_to_json, print_history
    from ffsplit.cli.tables import list_to_json, print_list
    from ffsplit.store.artifact import names_alias
    from ffsplit.store.store import open_store

    if named := names_alias(parsed.uri):
        print(history_to_json(*named)) if parsed.json else print_history(*named)
        return DONE
    store = open_store(parsed.uri)
    if parsed.json:
        print(list_to_json(store))
    else:
        print_list(store)
    return DONE


def promote(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.alias_lines import describe_change
    from ffsplit.store.aliases import check_alias, promote, remove_alias
    from ffsplit.store.artifact import locate, split_run

    alias = check_alias(parsed.alias)
    if parsed.remove:
        store, run_key = split_run(parsed.uri)
        print(describe_change(store, remove_alias(store, alias, run_key=run_key)))
        return DONE
    location = locate(parsed.uri)
    if location.commit is None:
        raise ConfigError(f"{location.uri} is not committed: only a committed run can be promoted")
    print(describe_change(location.store, promote(location.store, location.commit, alias=alias)))
    return DONE


def pin(parsed: argparse.Namespace) -> int:
    from ffsplit.store.artifact import locate
    from ffsplit.store.gc import pin, unpin

    location = locate(parsed.uri)
    done = f"{unpin(location)} is no longer pinned" if parsed.remove else f"{pin(location)} is pinned"
    print(done)
    return DONE


def gc(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.tables import print_plan
    from ffsplit.store.gc import collect, plan
    from ffsplit.store.store import open_store

    store = open_store(parsed.uri)
    planned = plan(store, keep_last=parsed.keep_last, min_age=parse_span(parsed.min_age, name="--min-age"))
    removed = collect(store, planned) if parsed.delete else None
    print_plan(planned, removed=removed)
    return DONE
