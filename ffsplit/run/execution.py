"""A run on its runner, with a scratch and a model that every host sees.

A path is valid on one host. On a cluster of several, a local --out must be a directory that all hosts share.
A local model that some host does not see is copied into the run's scratch. Each host fetches it from there
into its own cache and verifies it. The same holds for hosts that join later.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ffsplit.calibration.sampling import TextSample
from ffsplit.distributed.runner import ANSWER_WITHIN_S, Runner
from ffsplit.errors import ConfigError, FFSplitError, begun
from ffsplit.machine import multiplies_bfloat16
from ffsplit.models.fetch import ModelSource, described, staged
from ffsplit.progress import StageLog
from ffsplit.run.job import Run
from ffsplit.store.cache import is_remote
from ffsplit.store.scratch import Scratch
from ffsplit.store.store import open_store

SLOWEST_BYTES_PER_S = 1 << 20
"""A host that reads or fetches a model slower than this counts as hung."""


@dataclass(frozen=True)
class Execution:
    """What every stage needs to hand out its jobs. Their results are kept below `scratch`.

    `text` is the run's, and what the model wrote itself.
    """

    run: Run
    runner: Runner
    log: StageLog
    scratch: Scratch
    model: ModelSource
    text: TextSample

    def hand_over(self, directory: Path) -> ModelSource:
        """A checkpoint that this process assembled, readable by workers on any host."""
        source = self.model.model_copy(update={"path": str(directory), "files": (), "stored": None})
        if not self.runner.is_spread:
            return source
        return staged(
            described(source),
            self.scratch.part(f"checkpoints/{directory.name}"),
            once=False,
        )


def start(run: Run, runner: Runner, log: StageLog, scratch: Scratch) -> Execution:
    """The run's execution, once every host has what it needs.

    Raises ConfigError, with nothing left behind, if hosts are incompatible or do not see the scratch.
    """
    checkpoint = run.checkpoint
    left_out = tuple(ffn.name for ffn in checkpoint.left_out)
    model = ModelSource(path=str(checkpoint.directory), left_out=left_out, reads=checkpoint.reads)
    execution = Execution(run, runner, log, scratch, model, run.text)
    if not runner.is_spread:
        return execution
    _check_hosts_fit_alike(execution)
    execution = replace(execution, scratch=_seen_by_all(execution))
    with begun():
        return replace(execution, model=_model_for_all(execution))


def _check_hosts_fit_alike(execution: Execution) -> None:
    """Raise ConfigError if this host fits in bfloat16 and another cannot. GPU workers check themselves."""
    recipe, on_cpus = execution.run.recipe, execution.run.profile.device == "cpu"
    if on_cpus and recipe.fits_in_bfloat16:
        able = execution.runner.on_every_host("inputs", multiplies_bfloat16, "cpu")
        unable = sorted(host for host, is_able in able.items() if not is_able)
        if unable:
            raise ConfigError(
                f"this host fits layers in bfloat16, and {len(unable)} of {len(able)} hosts have no bfloat16 "
                f"instructions ({unable[0]} is one): give --dtype float32, or use hosts of the same kind"
            )


def _seen_by_all(execution: Execution) -> Scratch:
    """The scratch, with a file in it that every host has found. A bucket needs no such proof."""
    scratch = execution.scratch
    if is_remote(scratch.uri):
        return scratch
    store = open_store(scratch.uri)
    key = scratch.key(f"seen-by-all-{secrets.token_hex(8)}")
    store.put_bytes(key, b"")
    scratch = scratch.witnessed_by(key)
    seen = execution.runner.on_every_host("inputs", _is_visible, scratch)
    blind = sorted(host for host, sees in seen.items() if not sees)
    if blind:
        with suppress(FFSplitError):  # the error below matters more than a leftover file
            store.delete(key)
        raise ConfigError(
            f"--out {scratch.uri}: {len(blind)} of {len(seen)} hosts do not see this directory "
            f"({blind[0]} is one): give s3://bucket/prefix or a directory that all hosts share"
        )
    return scratch


def _model_for_all(execution: Execution) -> ModelSource:
    run, source = execution.run, execution.model
    if run.located.stored is not None:
        source = source.model_copy(update={"stored": run.located.stored})
    else:
        source = described(source)
        within_s = _longest_s(source)
        seen = execution.runner.on_every_host("inputs", ModelSource.is_here, source, within_s=within_s)
        if all(seen.values()):
            return source
        blind = sorted(host for host, sees in seen.items() if not sees)
        execution.log.note(
            f"{source.path}: {len(blind)} of {len(seen)} hosts do not see this model ({blind[0]} is one): "
            f"copying it to {execution.scratch.uri}/{execution.scratch.prefix} for all"
        )
        source = staged(source, execution.scratch.part("model"), once=True)
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
