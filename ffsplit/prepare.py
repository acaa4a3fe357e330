"""Everything that is checked and known before a run computes anything."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffsplit.artifacts.inputs import StoredFiles
from ffsplit.artifacts.statistics import PublishedStatistics, open_statistics
from ffsplit.calibration.batches import tokenize_rows
from ffsplit.calibration.sampling import TextSample, passages, sample_texts
from ffsplit.calibration.sources import read_all
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.capabilities import check_capabilities
from ffsplit.config import Budget, JobConfig, digest_of, stage_key
from ffsplit.environment import hardware_fingerprint
from ffsplit.errors import ConfigError
from ffsplit.ffn import LayerLayout
from ffsplit.gates import Gate, check_gates, gated_key, parse_gates
from ffsplit.measurement.size import model_shape
from ffsplit.measurement.tasks.evaluations import Evaluation, read_evaluations
from ffsplit.models.activations import activation_named
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_tokenizer, model_class
from ffsplit.models.locate import locate_model
from ffsplit.origin import check_origin, inherit
from ffsplit.plain import check_plain, check_stays_plain
from ffsplit.recipes.recipe import Recipe, load_recipe
from ffsplit.runtime.linears import attention_linears
from ffsplit.splitting.latency import read_latency_table
from ffsplit.splitting.plan import num_energetic
from ffsplit.splitting.solver import Solver
from ffsplit.stages.profile import ComputeProfile

CHARACTERS_PER_TOKEN = 6
"""More than English text has, so that a causal model's rows are cut by the tokenizer, not too short."""
GENERIC_NAMES = ("model", "checkpoint", "final", "best")
"""Directories that do not say which model they hold; their parents do."""


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: what it starts from, and the keys of its results.

    `layouts` and `keep` are what the budget comes to; where the statistics have a say in that, they
    are the least it can come to until the statistics are there. `checkpoint` is in a directory of this
    machine; where the model is in a store, other nodes have theirs from `stored_model`.
    `work_key` names what is computed, and so its scratch; `run_key` is the same, or where there are
    gates, the hash of it and them.
    """

    config: JobConfig
    recipe: Recipe
    budget: Budget
    solver: Solver
    keep: float
    checkpoint: Checkpoint
    stored_model: StoredFiles | None
    revision: str | None
    digests: dict[str, str]
    text: TextSample
    origin: PublishedStatistics | None
    evaluations: tuple[Evaluation, ...]
    profile: ComputeProfile
    layouts: tuple[LayerLayout, ...]
    calibration_key: str
    work_key: str
    run_key: str
    gates: tuple[Gate, ...]
    nonce: str | None


def prepare(config: JobConfig) -> PreparedRun:
    """Resolve and check a job. Raises ConfigError for whatever the user can mend; writes nothing."""
    window = config.max_length  # as asked for, not as inherited
    gates = parse_gates(config.gate, require_speedup=config.require_speedup)
    origin = None if config.stats is None else open_statistics(config.stats)
    if origin is not None:
        config = inherit(config, origin)
    recipe = resolve_recipe(config)
    profile = ComputeProfile.resolve(config)
    directory, revision, stored = locate_model(config.model, revision=config.revision)
    if revision is None and stored is None:
        config = config.model_copy(update={"model": str(directory)})
    checkpoint = open_checkpoint(directory)
    for index in range(len(checkpoint.ffns)):
        activation_named(checkpoint.activation_of(index))
    model_class(checkpoint.class_name, where=directory)
    check_capabilities(config, recipe, checkpoint)
    digests = {"model": checkpoint.model_digest(), "tokenizer": checkpoint.tokenizer_digest()}
    if origin is not None:
        check_origin(origin, digests=digests, revision=revision, profile=profile)
        digests["statistics"] = origin.sha256
    budget = config.budget or Budget(kind="keep", limit=recipe.keep)
    solver = make_solver(config, recipe, checkpoint, profile)
    recipe = with_target_shape(recipe, solver)
    layouts = solver.solve(budget)
    keep = keep_of(budget, solver, layouts)
    text = sample_rows(config.calibration, recipe=recipe, checkpoint=checkpoint, seed=config.seed)
    check_rows(text.calibration, checkpoint=checkpoint, max_length=recipe.calibration.max_length)
    evaluations = read_evaluations(
        config.eval, checkpoint=checkpoint, calibration=text.calibration, max_length=window
    )
    digests["text"] = text.digest
    nonce = secrets.token_hex(8) if config.fresh else None
    inputs: dict[str, Any] = {
        "digests": digests,
        "calibration": recipe.calibration.model_dump(mode="json"),
        "seed": config.seed,
        "profile": profile.model_dump(mode="json"),
        "nonce": nonce,
    }
    if recipe.healing is not None or recipe.after_healing is not None:
        check_plain(checkpoint, layouts, recipe=recipe)
    if recipe.linears != "kept":
        attention_linears(checkpoint)
    if config.plain:
        check_stays_plain(checkpoint, layouts, recipe=recipe)
    healing = healing_inputs(config) if recipe.healing is not None else None
    split = split_inputs(recipe, budget, solver, layouts=layouts, keep=keep)
    run_inputs = inputs | split | {"healing": healing}
    run_inputs |= {"evaluations": [evaluation.key_inputs for evaluation in evaluations]}
    check_gates(gates, checkpoint=checkpoint, recipe=recipe, evals=config.eval)
    work_key = stage_key("run", run_inputs)
    return PreparedRun(
        config=config,
        recipe=recipe.timing([gate.shape for gate in gates if gate.shape]),
        budget=budget,
        solver=solver,
        keep=keep,
        checkpoint=checkpoint,
        stored_model=stored,
        revision=revision,
        digests=digests,
        text=text,
        origin=origin,
        evaluations=evaluations,
        profile=profile,
        layouts=layouts,
        calibration_key=stage_key("calibrate", inputs),
        work_key=work_key,
        run_key=gated_key(work_key, gates),
        gates=gates,
        nonce=nonce,
    )


def settle(run: PreparedRun, statistics: Sequence[NeuronStats]) -> PreparedRun:
    """The run with the layouts that its budget comes to now that the statistics are there."""
    solver = replace(run.solver, num_energetic=num_energetic(run.recipe.heavy, statistics))
    layouts = run.layouts if solver.num_energetic is None else solver.solve(run.budget)
    return replace(run, solver=solver, layouts=layouts, keep=keep_of(run.budget, solver, layouts))


def resolve_recipe(config: JobConfig) -> Recipe:
    """The recipe with the flags that override it."""
    recipe = load_recipe(config.recipe)
    given = {"samples": config.samples, "max_length": config.max_length}
    changes = {name: value for name, value in given.items() if value is not None}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})


def healing_threads(config: JobConfig) -> int:
    """The threads of each worker that heals. They can change the result's last bits."""
    return config.healing_threads or max(1, (os.cpu_count() or 1) // config.healing_workers)


def healing_inputs(config: JobConfig) -> dict[str, int]:
    """What of the job, beside the recipe, can change the last bits of a healed model."""
    workers = {"workers": config.healing_workers} if config.healing_workers > 1 else {}
    return {"threads": healing_threads(config)} | workers


def make_solver(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint, profile: ComputeProfile) -> Solver:
    """What turns budgets into layouts, with the latency table where there is one."""
    model, table = model_shape(checkpoint), None
    if config.latency_table is not None:
        hardware = hardware_fingerprint(profile.device)
        table = read_latency_table(config.latency_table, model=model, hardware=hardware)
        if table.dtype != profile.dtype:
            raise ConfigError(
                f"--latency-table {config.latency_table} was measured in {table.dtype}, "
                f"the run computes in {profile.dtype}: give the same --dtype to both"
            )
    return Solver(model=model, heavy=recipe.heavy, steps=recipe.steps, latency=table)


def with_target_shape(recipe: Recipe, solver: Solver) -> Recipe:
    """The recipe, which also times the shape that a latency budget is about."""
    if solver.latency is None:
        return recipe
    return recipe.timing([(solver.latency.batch_size, solver.latency.num_tokens)])


def keep_of(budget: Budget, solver: Solver, layouts: Sequence[LayerLayout]) -> float:
    """The fraction of the FFN elements kept: as given, or what another kind of budget comes to."""
    if budget.kind == "keep":
        return float(budget.limit)
    return solver.model.elements_of(layouts) / solver.model.ffn_elements


def split_inputs(
    recipe: Recipe, budget: Budget, solver: Solver, *, layouts: Sequence[LayerLayout], keep: float
) -> dict[str, Any]:
    """The run key's part on the recipe and the budget: what that resolves to, or all that decides it."""
    inputs: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if solver.heavy.by == "energy" or recipe.allocation == "search":
        table = None if solver.latency is None else digest_of(solver.latency.model_dump(mode="json"))
        return inputs | {"budget": budget.model_dump(mode="json"), "latency_table": table}
    if budget.kind == "keep":
        return inputs | {"keep": keep}
    return inputs | {"keep": keep, "layouts": [layout.model_dump(mode="json") for layout in layouts]}


def sample_rows(specs: Sequence[str], *, recipe: Recipe, checkpoint: Checkpoint, seed: int) -> TextSample:
    """Calibration and held-out rows: a text each, or a window of running text for a causal LM."""
    texts = read_all(specs)
    settings = recipe.calibration
    if checkpoint.kind == "causal_lm":
        texts = passages(texts, max_characters=settings.max_length * CHARACTERS_PER_TOKEN)
    return sample_texts(
        texts,
        num_samples=settings.samples,
        num_held_out=settings.held_out,
        seed=seed,
        num_judged=settings.held_out if recipe.allocation == "search" or recipe.healing else 0,
    )


def check_rows(rows: Sequence[str], *, checkpoint: Checkpoint, max_length: int) -> None:
    """Raise ConfigError when rows are longer than the model reads, or none has a token to learn from."""
    longest = checkpoint.max_positions
    if longest is not None and max_length > longest:
        raise ConfigError(f"--max-length {max_length} is more than the model's {longest} positions")
    tokenizer = load_tokenizer(checkpoint)
    num_special = tokenizer.num_special_tokens_to_add()
    if max_length <= num_special:
        raise ConfigError(
            f"--max-length {max_length} leaves no room beside {num_special} special tokens: "
            f"give {num_special + 1} or more"
        )
    for start in range(0, len(rows), 256):
        if tokenize_rows(tokenizer, rows[start : start + 256], max_length=max_length):
            return
    raise ConfigError(
        f"the calibration text is nothing but padding and special tokens at --max-length {max_length}: "
        "give other text or a larger --max-length"
    )


def model_name(model: str) -> str:
    """What to call a model in a report: a hub id, or a local directory by its own name.

    Where that is generic, its parent's goes before it.
    """
    path = Path(model).expanduser().resolve()
    if not path.is_dir():
        return model
    return f"{path.parent.name}/{path.name}" if path.name in GENERIC_NAMES else path.name
