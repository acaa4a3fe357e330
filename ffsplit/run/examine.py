"""What a job comes to, from settings, text, config and headers: quick, since no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffsplit.calibration.media import embedded, read_media, read_pairs
from ffsplit.calibration.sampling import TextSample, passages, sample_texts
from ffsplit.calibration.sources import read_all
from ffsplit.config import Budget, JobConfig
from ffsplit.errors import ConfigError, explained
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.machine import check_device, hardware_fingerprint
from ffsplit.measurement.gates import Gate, check_gates, parse_gates
from ffsplit.measurement.size import model_shape
from ffsplit.measurement.tasks import AnyTask
from ffsplit.measurement.tasks.evaluations import read_tasks
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import may_search
from ffsplit.models.locate import locate_model
from ffsplit.models.rows import TEXT_KINDS
from ffsplit.profile import ComputeProfile
from ffsplit.recipes.recipe import Recipe, load_recipe
from ffsplit.run.checks import check_capabilities, check_plain, check_stays_plain
from ffsplit.run.origin import inherit
from ffsplit.runtime.linears import attention_linears
from ffsplit.splitting.latency import read_latency_table
from ffsplit.splitting.solver import Solver
from ffsplit.store.commits import Kind
from ffsplit.store.entries import LeftOut
from ffsplit.store.inputs import StoredFiles
from ffsplit.store.locate import PublishedStatistics, open_statistics

CHARACTERS_PER_TOKEN = 6
"""More than English text has, so that a causal model's rows are cut by the tokenizer, not too short."""


@dataclass(frozen=True)
class Examined:
    """A job whose settings go together. `recipe` is as its settings make it, without what gates time.

    `text` is the sample that was drawn, of which as much is read as the recipe's tokens allow.
    """

    config: JobConfig
    recipe: Recipe
    budget: Budget
    solver: Solver
    checkpoint: Checkpoint
    stored_model: StoredFiles | None
    left_out: tuple[LeftOut, ...]
    revision: str | None
    text: TextSample
    origin: PublishedStatistics | None
    tasks: dict[str, AnyTask]
    profile: ComputeProfile
    layouts: tuple[LayerLayout, ...]
    gates: tuple[Gate, ...]


@explained("the job cannot be checked")
def examine(config: JobConfig, *, kind: Kind = "model") -> Examined:
    """Resolve and check a job. Raises ConfigError for whatever the user can mend; writes nothing."""
    if kind == "statistics":
        check_calibrates(config)
    window = config.max_length  # as asked for, not as inherited
    gates = parse_gates(config.gate, require_speedup=config.require_speedup)
    origin = None if config.stats is None else open_statistics(config.stats)
    if origin is not None:
        config = inherit(config, origin)
    recipe = resolve_recipe(config)
    profile = ComputeProfile.resolve(config)
    if profile.device == "cpu" or config.runner == "serial":  # GPUs may be those of other hosts
        check_device(profile.device, profile.dtype)
    directory, revision, stored, unfetched = locate_model(config.model, revision=config.revision)
    if revision is None and stored is None:
        config = config.model_copy(update={"model": str(directory)})
    checkpoint = open_checkpoint(directory)
    left_out = {each.path: each for each in (*unfetched, *checkpoint.folder.files.left_out)}
    recipe = recipe.settled(checkpoint.kind, max_positions=checkpoint.max_positions)
    recipe = recipe.fitting(in_bfloat16=ComputeProfile.fits_in_bfloat16(config))
    recipe = recipe.searching(may_search(checkpoint) and not (config.plain or config.block_by_block))
    for index in range(len(checkpoint.ffns)):
        activation_named(checkpoint.activation_of(index))
    check_capabilities(config, recipe, checkpoint)
    budget = config.budget or Budget(kind="keep", limit=recipe.keep)
    solver = make_solver(config, recipe, checkpoint, profile)
    recipe = with_target_shape(recipe, solver)
    layouts = solver.solve(budget)
    if recipe.healing is not None or recipe.after_healing is not None:
        check_plain(checkpoint, layouts, recipe=recipe)
    if recipe.linears != "kept":
        attention_linears(checkpoint)
    if config.plain:
        check_stays_plain(checkpoint, layouts, recipe=recipe)
    text = sample_rows(config.calibration, recipe=recipe, checkpoint=checkpoint, seed=config.seed)
    check_row_length(recipe.calibration.row_length, checkpoint=checkpoint)
    tasks = read_tasks(config.eval, checkpoint=checkpoint, max_length=window)
    check_gates(gates, checkpoint=checkpoint, recipe=recipe, config=config)
    return Examined(
        config=config,
        recipe=recipe,
        budget=budget,
        solver=solver,
        checkpoint=checkpoint,
        stored_model=stored,
        left_out=tuple(left_out[path] for path in sorted(left_out)),
        revision=revision,
        text=text,
        origin=origin,
        tasks=tasks,
        profile=profile,
        layouts=layouts,
        gates=gates,
    )


def check_calibrates(config: JobConfig) -> None:
    """Raise ConfigError for what is for compressed models alone."""
    if config.stats is not None:
        raise ConfigError("--stats is for compress: calibrate collects statistics of its own")
    if config.gate or config.require_speedup is not None:
        raise ConfigError("gates are for compress: statistics have nothing to judge")


def resolve_recipe(config: JobConfig) -> Recipe:
    """The recipe with the flags that override it."""
    recipe = load_recipe(config.recipe)
    given = {"samples": config.samples, "max_length": config.max_length}
    changes: dict[str, int | None] = {name: value for name, value in given.items() if value is not None}
    if config.samples is not None:
        changes["max_tokens"] = None  # who names a number of rows gets them
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})


def make_solver(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint, profile: ComputeProfile) -> Solver:
    """What turns budgets into layouts, with the latency table where there is one."""
    model, table = model_shape(checkpoint), None
    if config.latency_table is not None:
        hardware = hardware_fingerprint(profile.device)
        table = read_latency_table(config.latency_table, model=model, hardware=hardware, dtype=profile.dtype)
    return Solver(
        model=model, heavy=recipe.heavy, steps=recipe.steps, finish=recipe.after_healing, latency=table
    )


def with_target_shape(recipe: Recipe, solver: Solver) -> Recipe:
    """The recipe, which also times the shape that a latency budget is about."""
    if solver.latency is None:
        return recipe
    return recipe.timing([(solver.latency.batch_size, solver.latency.num_tokens)])


def sample_rows(specs: Sequence[str], *, recipe: Recipe, checkpoint: Checkpoint, seed: int) -> TextSample:
    """Calibration and held-out rows: a text each, a window of running text for a causal LM, a source and
    its target, or a picture or sound."""
    settings, kind = recipe.calibration, checkpoint.kind
    if kind in ("encoder", "causal_lm"):
        texts = read_all(specs)
    else:
        texts = read_pairs(specs) if kind == "seq2seq" else read_media(specs, kind=kind)
    if kind == "causal_lm":
        texts = passages(texts, max_characters=settings.row_length * CHARACTERS_PER_TOKEN)
    sample = sample_texts(
        texts,
        num_samples=settings.samples,
        num_held_out=settings.held_out,
        seed=seed,
        num_judged=settings.held_out if recipe.allocation == "search" or recipe.healing else 0,
    )
    return sample if kind in TEXT_KINDS else sample.mapped(embedded)


def check_row_length(max_length: int, *, checkpoint: Checkpoint) -> None:
    """Raise ConfigError when rows are longer than the model reads."""
    longest = checkpoint.max_positions
    if longest is not None and max_length > longest and checkpoint.kind in TEXT_KINDS:
        raise ConfigError(f"--max-length {max_length} is more than the model's {longest} positions")
