"""What a job comes to, from settings, text, config and headers: quick, since no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ffsplit.artifacts.commits import Kind
from ffsplit.artifacts.inputs import StoredFiles
from ffsplit.artifacts.statistics import PublishedStatistics, open_statistics
from ffsplit.calibration.batches import num_rows_within, tokenize_rows
from ffsplit.calibration.media import embedded, read_media, read_pairs
from ffsplit.calibration.readers import TextReader, make_reader
from ffsplit.calibration.sampling import TextSample, passages, sample_texts
from ffsplit.calibration.sources import read_all
from ffsplit.config import Budget, JobConfig
from ffsplit.environment import hardware_fingerprint
from ffsplit.errors import ConfigError
from ffsplit.ffn import LayerLayout
from ffsplit.gates import Gate, check_gates, parse_gates
from ffsplit.machine import check_device
from ffsplit.measurement.size import model_shape
from ffsplit.measurement.tasks.evaluations import Evaluation, read_evaluations
from ffsplit.models.activations import activation_named
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import check_model_class, load_tokenizer
from ffsplit.models.locate import locate_model
from ffsplit.models.rows import TEXT_KINDS
from ffsplit.pipeline.capabilities import check_capabilities
from ffsplit.pipeline.origin import inherit
from ffsplit.pipeline.plain import check_plain, check_stays_plain
from ffsplit.recipes.recipe import Recipe, load_recipe
from ffsplit.runtime.linears import attention_linears
from ffsplit.splitting.latency import read_latency_table
from ffsplit.splitting.solver import Solver
from ffsplit.stages.profile import ComputeProfile

CHARACTERS_PER_TOKEN = 6
"""More than English text has, so that a causal model's rows are cut by the tokenizer, not too short."""


@dataclass(frozen=True)
class Examined:
    """A job whose settings go together. `recipe` is as its settings make it, without what gates time."""

    config: JobConfig
    recipe: Recipe
    budget: Budget
    solver: Solver
    keep: float
    checkpoint: Checkpoint
    stored_model: StoredFiles | None
    revision: str | None
    text: TextSample
    origin: PublishedStatistics | None
    evaluations: tuple[Evaluation, ...]
    profile: ComputeProfile
    layouts: tuple[LayerLayout, ...]
    gates: tuple[Gate, ...]


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
    directory, revision, stored = locate_model(config.model, revision=config.revision)
    if revision is None and stored is None:
        config = config.model_copy(update={"model": str(directory)})
    checkpoint = open_checkpoint(directory)
    recipe = recipe.settled(checkpoint.kind, max_positions=checkpoint.max_positions)
    for index in range(len(checkpoint.ffns)):
        activation_named(checkpoint.activation_of(index))
    check_model_class(checkpoint.class_name, where=directory)
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
    check_rows(text.calibration, checkpoint=checkpoint, max_length=recipe.calibration.row_length)
    text = within_tokens(text, recipe=recipe, checkpoint=checkpoint)
    evaluations = read_evaluations(
        config.eval, checkpoint=checkpoint, calibration=text.calibration, max_length=window
    )
    check_gates(gates, checkpoint=checkpoint, recipe=recipe, config=config)
    return Examined(
        config=config,
        recipe=recipe,
        budget=budget,
        solver=solver,
        keep=keep_of(budget, solver, layouts),
        checkpoint=checkpoint,
        stored_model=stored,
        revision=revision,
        text=text,
        origin=origin,
        evaluations=evaluations,
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


def within_tokens(text: TextSample, *, recipe: Recipe, checkpoint: Checkpoint) -> TextSample:
    """The sample with no more rows than the recipe's `max_tokens` and `held_out_tokens` have room for."""
    settings = recipe.calibration
    if checkpoint.kind not in ("encoder", "causal_lm"):
        return text
    tokenizer = load_tokenizer(checkpoint)

    def count(rows: Sequence[str], most: int | None) -> int:
        if most is None or len(rows) * settings.row_length <= most:
            return len(rows)
        return num_rows_within(tokenizer, rows, max_length=settings.row_length, max_tokens=most)

    return text.first(
        count(text.calibration, settings.max_tokens),
        held_out=count(text.held_out, settings.held_out_tokens),
        judged=count(text.judged, settings.held_out_tokens),
    )


def check_rows(rows: Sequence[str], *, checkpoint: Checkpoint, max_length: int) -> None:
    """Raise ConfigError when rows are longer than the model reads, or none has a token to learn from."""
    longest = checkpoint.max_positions
    if longest is not None and max_length > longest and checkpoint.kind in TEXT_KINDS:
        raise ConfigError(f"--max-length {max_length} is more than the model's {longest} positions")
    reader = make_reader(checkpoint, max_length=max_length, batch_tokens=max_length)
    if not isinstance(reader, TextReader):
        if next(reader.batches(reader.encode(rows[:8])), None) is None:
            raise ConfigError("the calibration rows hold nothing that the model reads: give others")
        return
    tokenizer = reader.tokenizer
    check_vocabulary(tokenizer, checkpoint)
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


def check_vocabulary(tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Raise ConfigError when the tokenizer gives tokens that the model has no embedding for."""
    stated = checkpoint.text_config.get("vocab_size")
    token, index = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if isinstance(stated, int) and index >= stated:
        raise ConfigError(
            f"{checkpoint.directory}: the tokenizer does not belong to the model: it has token {token!r} as "
            f"number {index}, and the model reads numbers below {stated}"
        )
