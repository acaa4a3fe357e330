"""A command as a job on a cluster: its name, and whether to start it or follow one that exists."""

from __future__ import annotations

import argparse
import secrets
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ffsplit import streams
from ffsplit.calibration.mixture import specs_of, without_share
from ffsplit.cli.commands import job_config
from ffsplit.config import JobConfig
from ffsplit.directories import user_path
from ffsplit.distributed.jobs import JobServer
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.exit_codes import INTERRUPTED
from ffsplit.keys import digest_of
from ffsplit.store.entries import check_absolute

UNNAMED = ("json", "workers", "address", "in_job", "sign_key", "file", "title", "debug")
"""Fields that the argument parser adds, or that do not change a job's result."""


class Job(NamedTuple):
    """What to submit. `is_done` is whether its result is committed, as seen from here."""

    name: str
    entrypoint: str
    is_done: bool = False


def submit(
    command: str,
    arguments: Sequence[str],
    parsed: argparse.Namespace,
    *,
    address: str,
    working_dir: Path | None,
    stop_on_interrupt: bool,
) -> int:
    """Run a command as a job and follow it. Returns the job's own exit code.

    A running job of the same name is followed instead, and so is a finished one whose result is committed.
    """
    _check_paths(arguments, working_dir=working_dir)
    job = describe(command, arguments, parsed)
    server = JobServer(address)
    last = server.last_attempt(job.name)
    if last is not None and (not last.is_over or (last.has_succeeded and job.is_done)):
        submission_id = last.id
        _note(
            f"following {submission_id}, which has {last.state}" if last.is_over else f"following {last.id}"
        )
    else:
        submission_id = server.start(job.name, after=last, entrypoint=job.entrypoint, working_dir=working_dir)
        _note(f"submitted {submission_id} to {address}")
    try:
        return server.follow(submission_id, _write)
    except KeyboardInterrupt:
        if stop_on_interrupt:
            server.stop(submission_id)
            _note(f"interrupted; {submission_id} is stopped")
        else:
            _note(
                f"interrupted; {submission_id} is still running: the same command follows it again, "
                f"`ray job stop --address {address} {submission_id}` stops it"
            )
        return INTERRUPTED


def describe(command: str, arguments: Sequence[str], parsed: argparse.Namespace) -> Job:
    """The job of a command. Raises ConfigError for what the job itself would refuse.

    The name contains the run key if all its inputs can be read here. Otherwise it contains a hash of the
    request, and a finished job does not count as a result.
    """
    target: str | None = vars(parsed).get("out", vars(parsed).get("directory"))
    if target is not None:
        check_absolute(target)
    entrypoint = shlex.join(["python", "-m", "ffsplit.cli", command, *arguments])
    if command in ("compress", "calibrate"):
        config = job_config(parsed)
        if config.fresh:
            return Job(f"ffsplit-{command}-{secrets.token_hex(8)}", entrypoint)
        if _is_here(config):
            return _of_run(command, config, entrypoint)
    request = {name: value for name, value in vars(parsed).items() if name not in UNNAMED}
    if command == "zoo":
        from ffsplit.zoo.zoo_file import load_zoo

        zoo = load_zoo(parsed.file)
        check_absolute(zoo.destination)
        request["zoo"] = zoo.digest
    return Job(f"ffsplit-{command}-{digest_of(request)[:16]}", entrypoint)


def _of_run(command: str, config: JobConfig, entrypoint: str) -> Job:
    """The job of a run whose key can be computed here. Its name also identifies where the result goes."""
    from ffsplit.run.checks import check_inputs
    from ffsplit.run.job import prepare
    from ffsplit.store.commits import Kind, read_commit
    from ffsplit.store.store import open_store

    kind: Kind = "model" if command == "compress" else "statistics"
    run = prepare(config, kind=kind)  # only the cluster can tell whether it fits
    key, store, is_done = run.keys.published(kind), open_store(config.out), False
    with suppress(FFSplitError):  # a store that only the cluster can read: the job checks it
        is_done = read_commit(store, key) is not None
    if not is_done:
        check_inputs(run)
    destination = digest_of({"out": store.uri})[:6]
    return Job(f"ffsplit-{command}-{key}-{destination}", entrypoint, is_done)


def _is_here(config: JobConfig) -> bool:
    """Whether the model and all that a job names can be read on this machine, without a download."""
    if not user_path(config.model).is_dir():
        return False
    specs = (*specs_of(config.calibration), *config.eval)
    if any(spec.startswith(("hf:", "lm-eval:")) or "://" in spec for spec in (*specs, config.stats or "")):
        return False
    files = [spec.partition("#")[0].rpartition(":")[2] for spec in specs]
    files += [config.recipe, config.stats or "", config.latency_table or ""]
    return all(Path(name).exists() for name in files if name.startswith("/"))


def _check_paths(arguments: Sequence[str], *, working_dir: Path | None) -> None:
    """Raise ConfigError for a relative path that the job would not find, since it runs elsewhere."""
    if working_dir is not None and working_dir.resolve() == Path.cwd():
        return
    for argument in arguments:
        name = without_share(argument).partition("#")[0].rpartition(":")[2]
        if name and not name.startswith(("/", "~", "-")) and Path(name).exists():
            raise ConfigError(
                f"{name} is relative to this directory, which the job does not see: give --working-dir . "
                "before the command to send this directory along, or an absolute path"
            )


def _note(message: str) -> None:
    streams.note(f"ffsplit: {message}")


def _write(text: str) -> None:
    print(text, end="", flush=True)
