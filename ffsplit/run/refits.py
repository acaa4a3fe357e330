"""Fits of all layers to what the compressed model gives them, after each was fitted in the original."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ffsplit.compressors import DistillCompressor
from ffsplit.keys import stage_key
from ffsplit.run.checks import can_refit
from ffsplit.run.execution import Execution, Layers, input_files
from ffsplit.run.stages.fit import RefitJob, refit_layer_job
from ffsplit.runtime.assemble import assemble
from ffsplit.store.scratch import Result


def refitted(execution: Execution, layers: Layers, shards: Sequence[Result], staging: Path) -> Layers:
    """The layers, fitted again as often as the recipe says, where what they make is an ordinary model.

    `shards` hold the inputs that they saw in the original. Each time the compressed model is put together
    beside `staging` and gives the inputs of the same tokens; the layers are then independent again.
    """
    run = execution.run
    if not can_refit(run.checkpoint, layers.layouts):
        return layers
    for number, step in enumerate(run.recipe.refits, start=1):
        compressed = staging.with_name(f"refit-{number}")
        assemble(run.checkpoint, layers.files, layers.layouts, compressed)
        layers = _refit(execution, number, step, compressed, shards)._replace(layouts=layers.layouts)
        shutil.rmtree(compressed)
    return layers


def _refit(
    execution: Execution, number: int, step: DistillCompressor, compressed: Path, shards: Sequence[Result]
) -> Layers:
    run, place = execution.run, f"refit-{number}"
    key = stage_key("refit", {"run": run.run_key, "number": number})
    model = execution.hand_over(compressed)
    own = execution.sample(model, place=f"{place}/sample", key=key)
    jobs = [
        RefitJob(
            original=execution.model,
            compressed=model,
            layer=layer,
            step=step,
            inputs=tuple(input_files(shards, ffn.unit)),
            own_inputs=tuple(input_files(own, ffn.unit)),
            scratch=execution.place(place),
            profile=run.profile,
        )
        for layer, ffn in enumerate(run.checkpoint.ffns)
    ]
    answers = execution.runner.map_tasks("refit", refit_layer_job, jobs)
    return execution.layers(execution.log.collect("refit", key, len(jobs), answers))
