"""What a run computes: its stages one after the other, from calibration to a measured checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.recipes.recipe import Recipe
from ffsplit.run.documents import Outcome
from ffsplit.run.execution import Execution, Layers, place_of
from ffsplit.run.prepare import PreparedRun, settle
from ffsplit.run.refits import refitted
from ffsplit.run.stages.search import in_one_line
from ffsplit.runtime.assemble import assemble, replace_weights
from ffsplit.runtime.linears import linears_config, quantize_linears
from ffsplit.splitting.scores import FEWEST_TOKENS, LayerPlan, is_starved, plan_split
from ffsplit.store.locate import STATISTICS_PATH
from ffsplit.store.manifest import LinearsRecord
from ffsplit.store.scratch import Result

MOST_NAMED = 16
"""Experts named in a line; the manifest has all."""


def compute_statistics(execution: Execution, staging: Path) -> tuple[PreparedRun, Outcome]:
    """Neuron statistics, which end up in `staging`."""
    shards = execution.calibrate()
    statistics = execution.reduce(shards, staging / STATISTICS_PATH)
    _say_tokens_of_experts(execution, statistics)
    return execution.run, Outcome("statistics", statistics, _num_tokens(shards), len(shards))


def compute_model(execution: Execution, staging: Path) -> tuple[PreparedRun, Outcome]:
    """A compressed checkpoint, which ends up in `staging`, and how it measures.

    The run comes back with the layouts that were settled on.
    """
    shards = execution.calibrate()
    statistics = execution.reduce(shards, staging / STATISTICS_PATH)
    _say_tokens_of_experts(execution, statistics)
    run, place, allocation = settle(execution.run, statistics), "compress", None
    if run.recipe.allocation == "search":
        found = replace(execution, run=run).allocate(
            statistics, shards, folder=staging.with_name("candidates")
        )
        run, allocation = replace(run, layouts=found.chosen.layouts), found.record
        place = place_of(found.chosen)
        execution.log.note(in_one_line(found.record))
    execution = replace(execution, run=run)
    plans = plan_split(statistics, run.layouts, score=run.recipe.score)
    layers = execution.compress("compress", run.checkpoint, run.recipe.steps, plans, shards, place=place)
    layers = refitted(execution, layers, shards, staging)
    layers, linears = _finish(execution, layers, shards, staging)
    measured = execution.measure(staging, layers.layouts)
    outcome = Outcome(
        kind="model",
        statistics=statistics,
        num_tokens=_num_tokens(shards),
        num_shards=len(shards),
        allocation=allocation,
        plans=_with_layouts(plans, layers.layouts),
        errors=layers.errors,
        linears=linears,
        measurements=measured,
    )
    return run, outcome


def _say_tokens_of_experts(execution: Execution, statistics: Sequence[NeuronStats]) -> None:
    """Say how many tokens the experts saw, and which of them saw too few to be judged by."""
    names = [ffn.name for ffn in execution.run.checkpoint.ffns]
    note = tokens_of_experts(statistics, names)
    if note is not None:
        execution.log.note(note)


def tokens_of_experts(statistics: Sequence[NeuronStats], names: Sequence[str]) -> str | None:
    """How many tokens the experts of a model saw, in one line that names the starved, fewest tokens first."""
    experts = sorted(
        (stats.num_tokens, index) for index, stats in enumerate(statistics) if stats.expert is not None
    )
    if not experts:
        return None
    line = f"{len(experts)} experts saw {experts[0][0]:,} to {experts[-1][0]:,} tokens each"
    starved = [(tokens, index) for tokens, index in experts if is_starved(statistics[index])]
    if not starved:
        return line
    shown = ", ".join(f"{names[index]} ({tokens})" for tokens, index in starved[:MOST_NAMED])
    more = f" and {len(starved) - MOST_NAMED} more, in the manifest" if len(starved) > MOST_NAMED else ""
    return (
        f"warning: {line}; {len(starved)} saw fewer than {FEWEST_TOKENS} and keep their neurons by weight "
        f"norm: {shown}{more}; more --samples would let them be judged"
    )


def _finish(
    execution: Execution, layers: Layers, shards: Sequence[Result], staging: Path
) -> tuple[Layers, LinearsRecord | None]:
    """Assemble the layers in `staging`; heal and then quantize them where the recipe says so."""
    run, recipe = execution.run, execution.run.recipe
    if recipe.healing is None and recipe.after_healing is None:
        assemble(run.checkpoint, layers.files, layers.layouts, staging)
        return layers, None
    whole = staging if recipe.after_healing is None else staging.with_name("healed")
    assemble(run.checkpoint, layers.files, layers.layouts, whole)
    if recipe.healing is not None:
        healed = execution.heal(recipe.healing, whole)
        replace_weights(whole, execution.scratch.path(healed.files[0]))
    if recipe.after_healing is None:
        return layers, None
    checkpoint = open_checkpoint(whole, uneven=True)
    plans = _quantization_plans(checkpoint, recipe)
    quantized = execution.compress(
        "quantize", checkpoint, (recipe.after_healing,), plans, shards, place="quantize"
    )
    files, record = list(quantized.files), None
    if recipe.linears == "int8":
        added, record = quantize_linears(checkpoint, staging.with_name("linears"), original=run.checkpoint)
        files += added
    linears = None if record is None else linears_config(record.modules)
    assemble(checkpoint, files, quantized.layouts, staging, linears=linears)
    return quantized._replace(errors=layers.errors), record


def _quantization_plans(checkpoint: Checkpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """Every neuron of every layer, in the format that the recipe ends with."""
    assert recipe.after_healing is not None
    plans = []
    for layer, shape in enumerate(checkpoint.shapes):
        dense = LayerLayout.dense(shape)
        layout = recipe.after_healing.plan(dense, shape=shape, budget=shape.num_elements)
        assert layout is not None, "quantization keeps every element"
        neurons = tuple(range(shape.num_neurons))
        plans.append(LayerPlan(layer=layer, layout=layout, heavy_neurons=neurons))
    return tuple(plans)


def _with_layouts(plans: Sequence[LayerPlan], layouts: Sequence[LayerLayout]) -> tuple[LayerPlan, ...]:
    """The plans with the layouts that came out of them."""
    pairs = zip(plans, layouts, strict=True)
    return tuple(plan.model_copy(update={"layout": layout}) for plan, layout in pairs)


def _num_tokens(shards: Sequence[Result]) -> int:
    return sum(int(str(result.facts["num_tokens"])) for result in shards)
