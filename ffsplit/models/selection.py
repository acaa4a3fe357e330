"""Which of a model's FFNs a run compresses: `--only` and `--skip`, and what stays unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import FFNShape
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.inputs import richer_rows
from ffsplit.store.manifest import LeftOutFFNs


def chosen(checkpoint: Checkpoint, *, only: Sequence[str], skip: Sequence[str]) -> Checkpoint:
    """The checkpoint, of whose FFNs those are left out that `only` does not match, or that `skip` does.

    Both are patterns of names. Raises ConfigError if a pattern matches nothing, if nothing is left, if a
    tower is named that the calibration data does not reach, or if experts of one block are told apart.
    """
    if not only and not skip:
        return checkpoint
    every = (*checkpoint.ffns, *checkpoint.left_out)
    for pattern in (*only, *skip):
        if not any(fnmatchcase(ffn.name, pattern) for ffn in every):
            names = list(dict.fromkeys(re.sub(r"\d+", "N", ffn.name) for ffn in every))
            raise ConfigError(f"no FFN is called {pattern!r}: there are {', '.join(names)} (N: a number)")

    def is_chosen(ffn: FFNPlace) -> bool:
        matches = not only or any(fnmatchcase(ffn.name, pattern) for pattern in only)
        return matches and not any(fnmatchcase(ffn.name, pattern) for pattern in skip)

    unreached = [ffn.name for ffn in checkpoint.left_out if only and is_chosen(ffn)]
    if unreached:
        advice = richer_rows(checkpoint.architecture, checkpoint.reads)
        raise ConfigError(
            f"--only: the calibration data of this model does not reach {unreached[0]}"
            + (f": {advice}" if advice else "")
        )
    _check_whole_mixtures([ffn for ffn in checkpoint.ffns if ffn.expert is not None], is_chosen)
    left_out = [ffn.name for ffn in checkpoint.ffns if not is_chosen(ffn)]
    if len(left_out) == len(checkpoint.ffns):
        raise ConfigError("--only and --skip leave no FFN to compress")
    names = [*left_out, *(ffn.name for ffn in checkpoint.left_out)]
    return open_checkpoint(checkpoint.directory, left_out=names, reads=checkpoint.given)


def _check_whole_mixtures(experts: Sequence[FFNPlace], is_chosen: Callable[[FFNPlace], bool]) -> None:
    """Raise ConfigError if a part of a block's experts is chosen: they are stored together."""
    units = {is_in: {ffn.unit for ffn in experts if is_chosen(ffn) == is_in} for is_in in (True, False)}
    for ffn in experts:
        if ffn.unit in units[True] & units[False]:
            pattern = re.sub(r"\d+$", "*", ffn.name)
            raise ConfigError(
                f"--only and --skip choose all experts of a block, or none of them: name them {pattern!r}"
            )


def left_out_ffns(checkpoint: Checkpoint) -> tuple[LeftOutFFNs, ...]:
    """The FFNs that are left out, by tower and reason."""
    shapes: dict[tuple[str, bool], list[FFNShape]] = {}
    for ffn in checkpoint.left_out:
        is_reached = checkpoint.architecture.reaches(ffn.tower, ffn.paths, checkpoint.reads)
        shapes.setdefault((ffn.tower.name, is_reached), []).append(ffn.shape)
    return tuple(
        LeftOutFFNs(
            tower=tower,
            num_ffns=len(found),
            num_elements=sum(shape.num_elements for shape in found),
            reason="--only and --skip leave them out"
            if is_reached
            else "the calibration data does not reach them",
        )
        for (tower, is_reached), found in shapes.items()
    )


def not_run(ffns: Sequence[FFNPlace]) -> str:
    """Why FFNs that the model did not run cannot be compressed, and what to do."""
    patterns = dict.fromkeys(re.sub(r"\d+", "*", ffn.name) for ffn in ffns)
    skipped = " ".join(f"--skip '{pattern}'" for pattern in patterns)
    return (
        f"the model does not run {ffns[0].name} on these calibration rows, so nothing tells which of its "
        f"neurons matter: leave out what is not run with {skipped}"
    )
