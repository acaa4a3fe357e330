"""One of several processes that heal divided models together, on CPUs: what `test_sharded` starts."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import distributed

from ffsplit.healing import losses
from ffsplit.healing.sharded import ShardedDistillation, checkpoint_blocks
from ffsplit.healing.team import Together
from ffsplit.run.stages import heal as stage
from ffsplit.run.stages.heal import HealJob

CHUNK_LOGITS, PASS_TOKENS = 1400, 48
"""So few that the processes have different numbers of chunks, and of passes."""


def in_small_passes(self: ShardedDistillation, *_: Any, **options: Any) -> ShardedDistillation:
    """As on a GPU whose memory is small."""
    checkpoint_blocks(self.distance.student, self.blocks)
    return replace(self, pass_tokens=PASS_TOKENS)


class Stopped(Exception):
    """All processes stop here, after the state of a step was written."""


def main(rank: int, size: int, folder: Path) -> None:
    """Do a list of jobs as on GPUs, each to its end or until a step."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    stage.is_divided = lambda team, device: isinstance(team, Together)  # type: ignore[assignment]
    losses.CHUNK_LOGITS = CHUNK_LOGITS
    ShardedDistillation.in_passes = in_small_passes  # type: ignore[method-assign]
    checkpoint: Any = stage._checkpoint_part
    stop_at: int | None = None

    def stop(scratch: Any, shard: str, state: Any, *rest: Any) -> None:
        checkpoint(scratch, shard, state, *rest)
        if state.step == stop_at:
            raise Stopped

    stage._checkpoint_part = stop
    for fields, stop_at in json.loads((folder / "jobs.json").read_text("utf-8")):
        job = HealJob.model_validate(fields)
        try:
            result = stage.heal_job(job)
            assert (result is not None) == (rank == 0)
        except Stopped:
            if rank == 0:  # one process had written its next part when another was lost
                for part in Path(job.scratch.uri).glob(f"run/heal/progress-0-of-*-{stop_at:08d}.*"):
                    next_one = part.name.replace(f"{stop_at:08d}", f"{stop_at + 1:08d}")
                    part.with_name(next_one).write_bytes(part.read_bytes())
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    os._exit(0)  # collecting torch's garbage takes longer than healing
