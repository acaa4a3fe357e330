"""Forecasts of budgets without a run: from a model's headers, or from an earlier run's statistics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import read_statistics
from ffsplit.config import Budget, BudgetKind, JobConfig, Record
from ffsplit.errors import BudgetError, ConfigError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, ModelShape, is_stock_form
from ffsplit.machine import hardware_fingerprint
from ffsplit.measurement.size import compressed_size, model_shape, original_size
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.fetch import locate_model
from ffsplit.models.load import may_search
from ffsplit.models.selection import left_out_ffns
from ffsplit.recipes.recipe import Recipe, load_recipe, recipe_of
from ffsplit.run.checks import check_has_experts
from ffsplit.runtime.assemble import is_plain
from ffsplit.splitting.latency import read_latency_table
from ffsplit.splitting.scores import (
    choose_dropped,
    energy_counts,
    energy_outside,
    num_energetic,
    plan_split,
)
from ffsplit.splitting.solver import Solver, checked_multiple
from ffsplit.store.artifact import open_statistics
from ffsplit.store.manifest import LeftOutFFNs

# A model's FFNs, from its config and safetensors headers alone.

BUDGETS = (0.75, 0.5, 0.3535, 0.25, 0.125)


class BudgetPreview(Record):
    """What one budget would give: the layout of each group's FFNs, and the model's size."""

    keep: float
    layouts: tuple[LayerLayout, ...]
    plain: bool
    num_parameters: int
    num_parameters_without_embeddings: int
    experts_per_block: int | None = Field(default=None, description="None if the recipe drops none")


class FFNGroup(Record):
    """FFNs of the same tower, shape and activation."""

    what: str
    num_ffns: int
    num_blocks: int
    shape: FFNShape
    activation: str
    num_elements: int


class Inspection(Record):
    """A model's FFNs: their shapes, and their share of all parameters."""

    model_type: str
    architecture: str
    activation: str
    shapes: tuple[FFNShape, ...]
    groups: tuple[FFNGroup, ...]
    num_parameters: int
    num_parameters_without_embeddings: int
    ffn_elements: int
    left_out_ffns: tuple[LeftOutFFNs, ...] = ()
    recipe: str
    budgets: tuple[BudgetPreview, ...]


def inspect(
    model: str | os.PathLike[str], *, recipe: str = "fast", width_multiple: int | None = None
) -> Inspection:
    """Inspect a model without loading weights. Raises ConfigError if it cannot be compressed."""
    checkpoint = open_checkpoint(locate_model(os.fspath(model)).directory)
    chosen = load_recipe(recipe).in_multiples_of(width_multiple).searching(may_search(checkpoint))
    drops_experts = chosen.expert_share > 0
    if drops_experts:
        check_has_experts(checkpoint, recipe=chosen)
    shape = model_shape(checkpoint, drops_experts=drops_experts)
    solver = _solver(shape, chosen)
    may_be_plain = chosen.after_healing is None and chosen.allocation == "uniform"
    size = original_size(checkpoint)
    budgets, firsts = [], [indices[0] for indices in _alike(checkpoint).values()]
    for keep in BUDGETS:
        try:
            layouts = solver.solve(Budget(kind="keep", limit=keep))
        except BudgetError:
            continue
        stored = solver.stored(layouts)
        after = compressed_size(checkpoint, layouts, file_bytes=0)
        budgets.append(
            BudgetPreview(
                keep=keep,
                layouts=tuple(stored[first] for first in firsts),
                plain=may_be_plain and is_plain(checkpoint, layouts),
                num_parameters=after.num_parameters,
                num_parameters_without_embeddings=after.num_parameters_without_embeddings,
                experts_per_block=_experts_left(shape, layouts),
            )
        )
    return Inspection(
        model_type=checkpoint.architecture.model_type,
        architecture=checkpoint.class_name,
        activation=checkpoint.activation,
        shapes=checkpoint.shapes,
        groups=_groups(checkpoint),
        num_parameters=size.num_parameters,
        num_parameters_without_embeddings=size.num_parameters_without_embeddings,
        ffn_elements=size.ffn_elements,
        left_out_ffns=left_out_ffns(checkpoint),
        recipe=chosen.name,
        budgets=tuple(budgets),
    )


def _solver(model: ModelShape, recipe: Recipe, **more: Any) -> Solver:
    return Solver(
        model=model,
        heavy=recipe.heavy,
        steps=recipe.steps,
        finish=recipe.after_healing,
        expert_share=recipe.expert_share,
        multiple=checked_multiple(recipe.width_multiple, model=model),
        **more,
    )


def _experts_left(model: ModelShape, layouts: Sequence[LayerLayout]) -> int | None:
    """How many experts of each block are left; None if none may be dropped."""
    mixture = model.mixture
    return None if mixture is None else mixture.num_experts - mixture.num_dropped(layouts)


def _alike(checkpoint: Checkpoint) -> dict[tuple[str, FFNShape, str], list[int]]:
    """The indices of FFNs, grouped by kind, shape and activation."""
    found: dict[tuple[str, FFNShape, str], list[int]] = {}
    for ffn in checkpoint.ffns:
        expert = "expert" if ffn.expert is not None else ""
        what = " ".join(part for part in (ffn.tower.name, ffn.paths.label, expert) if part)
        key = (what or "layer", ffn.shape, checkpoint.activation_of(ffn.index))
        found.setdefault(key, []).append(ffn.index)
    return found


def _groups(checkpoint: Checkpoint) -> tuple[FFNGroup, ...]:
    return tuple(
        FFNGroup(
            what=what,
            num_ffns=len(indices),
            num_blocks=len({checkpoint.ffns[index].block for index in indices}),
            shape=shape,
            activation=activation,
            num_elements=len(indices) * shape.num_elements,
        )
        for (what, shape, activation), indices in _alike(checkpoint).items()
    )


DEFAULT_KEEPS = (0.75, 0.5, 0.3535, 0.25, 0.2, 0.125)


class LayerForecast(Record):
    """The forecast for one layer under one budget."""

    layer: int
    layout: LayerLayout
    num_elements: int
    size_bytes: int
    heavy_neurons: tuple[int, ...]
    energy_outside: float = Field(
        description="the predicted error: fraction of the layer's output energy (the sum over its neurons) "
        "outside the heavy hitters. This energy is dropped with the other neurons, or carried by their "
        "compressed form. What a refit recovers is not counted"
    )


class BudgetForecast(Record):
    """The forecast for the model under one budget, with uniform layers."""

    budget: Budget
    keep: float = Field(description="FFN elements stored, as a fraction of the original's")
    keep_unrounded: float = Field(description="the same, if widths and ranks were not rounded")
    plain: bool
    num_parameters: int
    num_parameters_without_embeddings: int
    ffn_elements: int
    ffn_bytes: int
    latency_ms: float | None = Field(description="from the latency table, if one is given")
    energy_outside: float = Field(description="mean over the layers")
    experts_per_block: int | None = Field(default=None, description="None if the recipe drops none")
    layers: tuple[LayerForecast, ...]


class Concentration(Record):
    """How a layer's output energy is spread over its neurons."""

    layer: int
    name: str = Field(description="which FFN it is, as in `layer 3 expert 12`")
    num_neurons: int
    neurons_for_energy: dict[str, int] = Field(description="percent of energy -> fewest neurons that hold it")


class Plans(Record):
    """Forecasts for an earlier run's model under several budgets."""

    model: str
    statistics: str
    statistics_sha256: str
    recipe: str
    allocation: str = Field(
        description="forecasts are uniform; a recipe that searches chooses widths during a run"
    )
    num_parameters: int
    num_parameters_without_embeddings: int
    ffn_elements: int
    ffn_bytes: int
    concentration: tuple[Concentration, ...]
    budgets: tuple[BudgetForecast, ...]


def checked_budget(kind: BudgetKind, limit: float | str, *, latency_table: str | None = None) -> Budget:
    """A budget, checked like a job's. Raises ConfigError in one line."""
    table = latency_table if kind == "max_latency_ms" else None
    fields = {kind: limit, "latency_table": table}
    budget = JobConfig.of_flags(model="-", out="-", **fields).budget
    assert budget is not None
    return budget


def plan(
    uri: str | os.PathLike[str],
    *,
    budgets: Sequence[Budget] = (),
    recipe: str | None = None,
    latency_table: str | None = None,
    width_multiple: int | None = None,
) -> Plans:
    """Forecast every budget; by default some usual fractions that the recipe can meet.

    Raises ConfigError when the URI holds no statistics, and BudgetError when one of the budgets cannot be
    met.
    """
    uri = os.fspath(uri)
    published = open_statistics(uri)
    manifest, model = published.manifest, published.manifest.model.shape
    statistics = read_statistics(published.path)
    chosen = load_recipe(recipe) if recipe is not None else recipe_of(manifest.recipe, where=uri)
    chosen = chosen.in_multiples_of(width_multiple)
    table = None
    if latency_table is not None:
        compute = manifest.compute
        hardware = hardware_fingerprint(compute.device)
        table = read_latency_table(latency_table, model=model, hardware=hardware, dtype=compute.dtype)
    if chosen.expert_share and model.mixture is None:
        raise ConfigError(
            f"recipe {chosen.name} drops experts, and {uri} does not say which its router can spare: give a "
            f"run of calibrate or compress with --recipe {chosen.name}"
        )
    solver = _solver(
        model if chosen.expert_share else model.model_copy(update={"mixture": None}),
        chosen,
        latency=table,
        num_energetic=num_energetic(chosen.heavy, statistics),
    )
    left_out = sum(each.num_elements for each in manifest.model.left_out_ffns)
    given = budgets or [Budget(kind="keep", limit=keep) for keep in DEFAULT_KEEPS]
    forecasts = []
    for budget in given:
        try:
            forecasts.append(_forecast(budget, solver, statistics, recipe=chosen, left_out=left_out))
        except BudgetError:
            if budgets:
                raise
    return Plans(
        model=manifest.model.id,
        statistics=published.uri,
        statistics_sha256=published.sha256,
        recipe=chosen.name,
        allocation="uniform",
        num_parameters=model.num_parameters,
        num_parameters_without_embeddings=model.num_parameters_without_embeddings,
        ffn_elements=model.ffn_elements + left_out,
        ffn_bytes=model.ffn_bytes + left_out * model.itemsize,
        concentration=tuple(
            Concentration(
                layer=record.layer,
                name=record.name,
                num_neurons=stats.num_neurons,
                neurons_for_energy=energy_counts(stats),
            )
            for record, stats in zip(manifest.layers, statistics, strict=True)
        ),
        budgets=tuple(forecasts),
    )


def _forecast(
    budget: Budget, solver: Solver, statistics: Sequence[NeuronStats], *, recipe: Recipe, left_out: int
) -> BudgetForecast:
    """`left_out` are the elements of FFNs that stay as they are."""
    model, layouts = solver.model, solver.solve(budget)
    if model.mixture is not None:
        layouts = choose_dropped(layouts, statistics, mixture=model.mixture)
    plans, stored = plan_split(statistics, layouts, score=recipe.score), solver.stored(layouts)
    layers = []
    for plan, layout, shape, stats in zip(plans, stored, model.shapes, statistics, strict=True):
        layers.append(
            LayerForecast(
                layer=plan.layer,
                layout=layout,
                num_elements=layout.num_elements(shape),
                size_bytes=layout.size_bytes(shape, model.itemsize),
                heavy_neurons=plan.heavy_neurons,
                energy_outside=energy_outside(stats, plan.heavy_neurons),
            )
        )
    elements = model.elements_of(layouts) + left_out
    unrounded = model.elements_of(solver.unrounded.solve(budget)) + left_out
    timed = solver.latency is not None and all(layout.is_dense for layout in stored)
    in_latency = Budget(kind="max_latency_ms", limit=1)
    return BudgetForecast(
        budget=budget,
        keep=elements / (model.ffn_elements + left_out),
        keep_unrounded=unrounded / (model.ffn_elements + left_out),
        plain=is_stock_form(stored, model.shapes, groups=model.width_groups),
        num_parameters=model.parameters_of(layouts),
        num_parameters_without_embeddings=model.parameters_in_blocks_of(layouts),
        ffn_elements=elements,
        ffn_bytes=model.bytes_of(stored) + left_out * model.itemsize,
        latency_ms=solver.cost(in_latency, layouts) if timed else None,
        energy_outside=sum(layer.energy_outside for layer in layers) / len(layers),
        experts_per_block=_experts_left(model, layouts),
        layers=tuple(layers),
    )
