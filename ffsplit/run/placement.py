"""What a run reads and writes, made sure of on every host of a cluster before anything is computed.

A path means something on one host. On a cluster of several, a local --out has to be one directory for all
of them; a local model that some host does not see is put into the run's scratch, from where each host
fetches it, verified, into its own cache. Hosts that join later are held to the same.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import replace

from ffsplit.distributed.runner import ANSWER_WITHIN_S, Runner
from ffsplit.errors import ConfigError, FFSplitError, begun
from ffsplit.machine import multiplies_bfloat16
from ffsplit.models.locate import ModelSource, described, staged
from ffsplit.progress import Progress, StageLog
from ffsplit.run.execution import Execution
from ffsplit.run.prepare import PreparedRun
from ffsplit.store.inputs import is_remote
from ffsplit.store.scratch import Scratch
from ffsplit.store.store import open_store

SLOWEST_BYTES_PER_S = 1 << 20
"""A host that reads or fetches a model slower than this is taken for one that hangs."""


def place(run: PreparedRun, scratch: Scratch, runner: Runner, log: StageLog, *, shown: Progress) -> Execution:
    """The run's execution, with a scratch and a model that every host sees.

    Raises ConfigError, with nothing left behind, where some host does not see the scratch.
    """
    execution = Execution(run, scratch, runner, log, ModelSource(path=str(run.checkpoint.directory)))
    if not execution.runner.is_spread:
        return execution
    _check_fits(execution)
    scratch = _seen_by_all(execution)
    execution = replace(execution, scratch=scratch)
    with begun():
        return replace(execution, model=_model_for_all(execution, shown))


def _check_fits(execution: Execution) -> None:
    """Raise ConfigError where a host cannot fit as this one; workers on GPUs find out for themselves."""
    recipe, on_cpus = execution.run.recipe, execution.run.profile.device == "cpu"
    if on_cpus and recipe.fits_in_bfloat16:
        able = execution.runner.on_every_host("inputs", multiplies_bfloat16, "cpu")
        unable = sorted(host for host, is_able in able.items() if not is_able)
        if unable:
            raise ConfigError(
                f"this host fits layers with bfloat16 products, and {len(unable)} of {len(able)} hosts have "
                f"no instructions for them ({unable[0]}): give --dtype float32, or use hosts of one kind"
            )


def _seen_by_all(execution: Execution) -> Scratch:
    """The scratch, with something in it that every host has found. A bucket needs no such proof."""
    scratch = execution.scratch
    if is_remote(scratch.uri):
        return scratch
    store = open_store(scratch.uri)
    key = scratch.key(f"seen-by-all-{secrets.token_hex(8)}")
    store.put_bytes(key, b"")
    scratch = scratch.model_copy(update={"witness": key})
    seen = execution.runner.on_every_host("inputs", _is_visible, scratch)
    blind = sorted(host for host, sees in seen.items() if not sees)
    if blind:
        with suppress(FFSplitError):  # what is wrong is said, whether or not this can be cleared away
            store.delete(key)
        raise ConfigError(
            f"--out {scratch.uri}: {len(blind)} of {len(seen)} hosts do not see this directory "
            f"({blind[0]} is one): give s3://bucket/prefix or a directory that all hosts share"
        )
    return scratch


def _model_for_all(execution: Execution, shown: Progress) -> ModelSource:
    run, path = execution.run, str(execution.run.checkpoint.directory)
    if run.stored_model is not None:
        source = ModelSource(path=path, stored=run.stored_model)
    else:
        source = described(run.checkpoint.directory)
        within_s = _longest_s(source)
        seen = execution.runner.on_every_host("inputs", ModelSource.is_here, source, within_s=within_s)
        if all(seen.values()):
            return source
        blind = sorted(host for host, sees in seen.items() if not sees)
        shown.note(
            f"{path}: {len(blind)} of {len(seen)} hosts do not see this model ({blind[0]} is one): "
            f"it is put into {execution.scratch.uri}/{execution.scratch.prefix} for all"
        )
        source = staged(source, execution.scratch.place("model"), once=True)
    execution.runner.on_every_host("inputs", _fetch, source, within_s=_longest_s(source))
    return source


def _longest_s(source: ModelSource) -> float:
    """How long a host may take to read or fetch a model's files."""
    files = source.files if source.stored is None else source.stored.files
    return ANSWER_WITHIN_S + sum(entry.size_bytes for entry in files) / SLOWEST_BYTES_PER_S


def _is_visible(scratch: Scratch) -> bool:
    assert scratch.witness is not None
    return open_store(scratch.uri).exists(scratch.witness)


def _fetch(source: ModelSource) -> str:
    return str(source.directory())
