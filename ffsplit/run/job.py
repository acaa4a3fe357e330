"""From a JobConfig to a Run: settings, model, text, budget, needs and keys. Loads no weights."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from ffsplit.calibration.media import embedded, media_given, read_media, read_pairs
from ffsplit.calibration.mixture import Drawn, Mixture, OwnRows, draw, parse_mixture, specs_of
from ffsplit.calibration.sampling import TextSample, passages
from ffsplit.calibration.sources import read_texts
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import Budget, JobConfig
from ffsplit.errors import explained
from ffsplit.ffn.activations import check_activation
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.keys import ALGORITHM_VERSION, digest_of, stage_key
from ffsplit.machine import check_device, hardware_fingerprint, usable_cores
from ffsplit.measurement.gates import Gate, check_gates, gated_key, parse_gates
from ffsplit.measurement.size import model_shape
from ffsplit.measurement.tasks import AnyTask
from ffsplit.measurement.tasks.evaluations import Evaluation, evaluations_of, key_inputs, read_tasks
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.family import TEXT
from ffsplit.models.fetch import LocatedModel, locate_model
from ffsplit.models.load import may_search
from ffsplit.models.load_options import attending, trusting
from ffsplit.models.selection import chosen, left_out_ffns
from ffsplit.recipes.recipe import MeasurementSettings, Recipe, load_recipe
from ffsplit.run.checks import (
    check_calibrates,
    check_capabilities,
    check_plain,
    check_row_length,
    check_splits,
    check_stays_plain,
    check_writes,
    readable,
)
from ffsplit.run.estimate import estimate, holds_both
from ffsplit.run.needs import Needs
from ffsplit.run.reused_statistics import check_origin, check_weighs_experts, inherit
from ffsplit.runtime.attention_int8 import attention_linears
from ffsplit.splitting.latency import read_latency_table
from ffsplit.splitting.scores import choose_dropped, num_energetic
from ffsplit.splitting.solver import Solver, checked_multiple
from ffsplit.store.artifact import PublishedStatistics, open_statistics
from ffsplit.store.commits import Kind
from ffsplit.store.entries import LeftOut, check_outside_attempts
from ffsplit.store.store import open_store

CHARACTERS_PER_TOKEN = 6
"""More than English text has: a causal model's rows are then long enough, and the tokenizer cuts them."""


@dataclass(frozen=True)
class Keys:
    """The names of a run's results, and the digests that they are made from.

    `inputs` are digests too: of everything that the published key depends on, by its name for people.
    `work` names what is computed, and so its scratch. `run` names what is published: it is `work`, or with
    gates a hash of `work` and the gates. `statistics` names the neuron statistics.
    """

    digests: dict[str, str]
    inputs: dict[str, str]
    statistics: str
    work: str
    run: str
    nonce: str | None

    def published(self, kind: Kind) -> str:
        """The key that a run of this kind is published under."""
        return self.run if kind == "model" else self.statistics

    def scratch(self, kind: Kind) -> str:
        """The key that a run of this kind keeps its unfinished results under."""
        return self.work if kind == "model" else self.statistics


@dataclass(frozen=True)
class Run:
    """A checked job, and everything it starts from.

    With --stats, `config` has the earlier run's text and seed unless it gave its own. `recipe` has this
    model's defaults filled in. `layouts` is the solved budget. If it depends on statistics, it is the
    minimum until they exist. `sample` is the text that was drawn, and `own` counts the rows that the model
    is to write beside it. `needs`, `keys`, `text` and `evaluations` cost more than reading config and
    headers, so they are computed on first use.
    """

    config: JobConfig
    kind: Kind
    recipe: Recipe
    budget: Budget
    solver: Solver
    checkpoint: Checkpoint
    located: LocatedModel
    sample: TextSample
    own: OwnRows
    origin: PublishedStatistics | None
    tasks: dict[str, AnyTask]
    profile: ComputeProfile
    layouts: tuple[LayerLayout, ...]
    gates: tuple[Gate, ...]

    @cached_property
    def needs(self) -> Needs:
        """Memory, disk and time. Measures this machine's speed."""
        return estimate(self)

    @cached_property
    def keys(self) -> Keys:
        """The keys of the results. Reads every byte of the model, for its digest."""
        with explained("the job cannot be checked"):
            return _keys(self)

    @cached_property
    def text(self) -> TextSample:
        """The rows of the sample that the run reads, up to the recipe's token limits.

        Loads the tokenizer, and so transformers. Raises ConfigError if the model cannot read the rows.
        """
        with explained("the job cannot be checked"), self.profile.loading():
            settings = self.recipe.calibration.beside(self.own.calibration)
            return readable(self.sample, settings=settings, checkpoint=self.checkpoint)

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What both models are scored on. Loads the tokenizer."""
        return evaluations_of(self.tasks, calibration=self.text.calibration)

    @property
    def model(self) -> str:
        """The model as it was found: a local directory, or the hub id or URI that was given."""
        is_local = self.located.revision is None and self.located.stored is None
        return str(self.located.directory) if is_local else self.config.model

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Files of the model's folder that the artifact leaves out, by path."""
        found = {each.path: each for each in (*self.located.left_out, *self.checkpoint.folder.files.left_out)}
        return tuple(found[path] for path in sorted(found))

    @property
    def lineage(self) -> dict[str, str]:
        """What the statistics are made from. No time, host or number of workers: bytes are reproducible."""
        return self.keys.digests | {"text": self.text.digest, "calibration": self.keys.statistics}

    @property
    def measurement(self) -> MeasurementSettings:
        """The recipe's settings, with the shapes that gates name."""
        return self.recipe.measurement.timing([gate.shape for gate in self.gates if gate.shape])

    @property
    def healing_threads(self) -> int:
        """CPU threads per healing worker. They can change the result's last bits.

        Default: the driver's usable cores, divided among the workers. With more threads than the CPU quota
        has cores, every step would wait for throttled threads.
        """
        return self.config.healing_threads or max(1, usable_cores() // self.config.healing_workers)

    def settled(self, statistics: Sequence[NeuronStats]) -> tuple[Solver, tuple[LayerLayout, ...]]:
        """Solve the layouts again, now with statistics. Returns the solver too."""
        solver = replace(self.solver, num_energetic=num_energetic(self.recipe.heavy, statistics))
        if solver.model.mixture is not None:
            return solver, choose_dropped(self.layouts, statistics, mixture=solver.model.mixture)
        return solver, self.layouts if solver.num_energetic is None else solver.solve(self.budget)

    def kept(self, layouts: Sequence[LayerLayout]) -> float:
        """The elements of all FFNs, those that are left out included, as a fraction of the original's."""
        left_out = sum(each.num_elements for each in left_out_ffns(self.checkpoint))
        elements = self.solver.model.elements_of(layouts)
        return (elements + left_out) / (self.solver.model.ffn_elements + left_out)

    def kept_unrounded(self, statistics: Sequence[NeuronStats] | None = None) -> float:
        """The same of the layouts that the budget allows if no width or rank is rounded."""
        solver = self.solver if statistics is None else self.settled(statistics)[0]
        return self.kept(solver.unrounded.solve(self.budget))


@explained("the job cannot be checked")
def prepare(config: JobConfig, *, kind: Kind = "model") -> Run:
    """Resolve and check a job. Raises ConfigError for whatever the user can fix; writes nothing.

    Whether the machine is large enough is checked by `needs.check`, and what config and headers cannot show
    by `checks.check_inputs`.
    """
    check_outside_attempts(open_store(config.out).uri, flag="--out")
    with trusting(config.trust_remote_code), attending(config.attn_implementation):
        return _prepare(config, kind)


def _prepare(config: JobConfig, kind: Kind) -> Run:
    if kind == "statistics":
        check_calibrates(config)
    window = config.max_length  # as requested, not as inherited
    gates = parse_gates(config.gate, require_speedup=config.require_speedup)
    origin = None if config.stats is None else open_statistics(config.stats)
    if origin is not None:
        config = inherit(config, origin)
    recipe = _recipe_of(config)
    profile = ComputeProfile.resolve(config)
    if profile.device == "cpu" or config.runner == "serial":  # else the GPUs may be on other hosts
        check_device(profile.device, profile.dtype)
    located = locate_model(config.model, revision=config.revision)
    if origin is not None and recipe.expert_share:
        check_weighs_experts(origin)
    checkpoint = _reading(open_checkpoint(located.directory), config)
    windows = _reads_windows(checkpoint)
    in_bfloat16, on_gpu = ComputeProfile.fits_in_bfloat16(config), profile.device == "cuda"
    recipe = recipe.settled(windows=windows, max_positions=checkpoint.max_positions, on_gpu=on_gpu)
    recipe = recipe.training(in_bfloat16=in_bfloat16, on_gpu=on_gpu, windows=windows)
    for ffn in checkpoint.ffns:
        check_activation(checkpoint.activation_of(ffn.index), ffn.activation_tensors)
    check_capabilities(config, recipe, checkpoint)
    budget = config.budget or Budget(kind="keep", limit=recipe.keep)
    solver = _make_solver(config, recipe, checkpoint, profile)
    if solver.latency is not None:
        recipe = recipe.timing([(solver.latency.batch_size, solver.latency.num_tokens)])
    layouts = solver.solve(budget)
    if searches := would_search(config, recipe, checkpoint):
        searches = holds_both(checkpoint, recipe, layouts, config=config, profile=profile)
    recipe = recipe.searching(searches)
    if recipe.healing is not None or recipe.after_healing is not None:
        check_plain(checkpoint, layouts, recipe=recipe)
    check_splits(checkpoint, layouts, recipe=recipe)
    if recipe.linears != "kept":
        attention_linears(checkpoint)
    if config.plain:
        check_stays_plain(checkpoint, layouts, recipe=recipe)
    mixture = parse_mixture(config.calibration, own_share=recipe.calibration.own_share)
    if mixture.has_own and not check_writes(mixture, checkpoint=checkpoint, config=config):
        mixture = mixture.without_own()
    recipe = recipe.model_copy(update={"calibration": mixture.allowed(recipe.calibration)})
    sample, own = _draw_rows(mixture, recipe=recipe, checkpoint=checkpoint, seed=config.seed)
    check_row_length(recipe.calibration.row_length, checkpoint=checkpoint)
    tasks = read_tasks(config.eval, checkpoint=checkpoint, max_length=window)
    check_gates(gates, checkpoint=checkpoint, recipe=recipe, config=config)
    return Run(
        config=config,
        kind=kind,
        recipe=recipe,
        budget=budget,
        solver=solver,
        checkpoint=checkpoint,
        located=located,
        sample=sample,
        own=own,
        origin=origin,
        tasks=tasks,
        profile=profile,
        layouts=layouts,
        gates=gates,
    )


def would_search(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Whether `allocation: auto` searches if there is enough memory."""
    is_auto = recipe.allocation == "auto" and not (config.plain or config.block_by_block)
    return is_auto and may_search(checkpoint)


def _reading(checkpoint: Checkpoint, config: JobConfig) -> Checkpoint:
    """The checkpoint with the FFNs that the calibration data reaches, and that --only and --skip leave."""
    given = media_given(specs_of(config.calibration), architecture=checkpoint.architecture)
    if given != checkpoint.architecture.reads:
        checkpoint = open_checkpoint(checkpoint.directory, reads=given)
    return chosen(checkpoint, only=config.only, skip=config.skip)


def _reads_windows(checkpoint: Checkpoint) -> bool:
    """Whether a row is a window of running text: for language models that read text alone."""
    return checkpoint.reads_single_texts and checkpoint.makes == "next_tokens"


def _recipe_of(config: JobConfig) -> Recipe:
    """The recipe with the flags that override it."""
    recipe = load_recipe(config.recipe)
    recipe = recipe.in_multiples_of(config.width_multiple)
    return recipe.reading(samples=config.samples, max_length=config.max_length)


def _make_solver(
    config: JobConfig, recipe: Recipe, checkpoint: Checkpoint, profile: ComputeProfile
) -> Solver:
    """The solver that turns budgets into layouts, with the latency table if there is one."""
    model, table = model_shape(checkpoint, drops_experts=recipe.expert_share > 0), None
    if config.latency_table is not None:
        hardware = hardware_fingerprint(profile.device)
        table = read_latency_table(config.latency_table, model=model, hardware=hardware, dtype=profile.dtype)
    return Solver(
        model=model,
        heavy=recipe.heavy,
        steps=recipe.steps,
        finish=recipe.after_healing,
        latency=table,
        expert_share=recipe.expert_share,
        multiple=checked_multiple(recipe.width_multiple, model=model),
    )


def _draw_rows(mixture: Mixture, *, recipe: Recipe, checkpoint: Checkpoint, seed: int) -> Drawn:
    """Calibration and held-out rows, each one text, one window of running text (causal LM), one source
    with its target, or one picture or sound."""
    settings, reads_text = recipe.calibration, checkpoint.reads == TEXT
    texts = [_texts_of(spec, checkpoint=checkpoint) for spec in mixture.specs]
    if mixture.shares is None and texts:
        texts = [[text for source in texts for text in source]]
    if _reads_windows(checkpoint):
        longest = settings.row_length * CHARACTERS_PER_TOKEN
        texts = [passages(source, max_characters=longest) for source in texts]
    chooses = recipe.allocation == "search" or recipe.healing
    num_validation = settings.held_out if chooses else 0
    drawn = draw(mixture, texts, settings=settings, seed=seed, num_validation=num_validation)
    if reads_text:
        return drawn
    return drawn._replace(sample=drawn.sample.mapped(partial(embedded, reads=checkpoint.reads)))


def _texts_of(spec: str, *, checkpoint: Checkpoint) -> list[str]:
    """The rows of one source, before windows are made of them."""
    if checkpoint.reads_single_texts:
        return read_texts(spec)
    return read_pairs([spec]) if checkpoint.reads == TEXT else read_media([spec], reads=checkpoint.reads)


def _keys(run: Run) -> Keys:
    """The keys of a run's results: hashes over every byte of its inputs.

    No row has to be tokenized: how many rows are read follows from the sample, the tokenizer and the
    settings, which are all in the keys.
    """
    config, recipe, checkpoint = run.config, run.recipe, run.checkpoint
    digests = {"model": checkpoint.model_digest(), "tokenizer": checkpoint.tokenizer_digest()}
    if run.origin is not None:
        check_origin(
            run.origin,
            digests=digests,
            revision=run.located.revision,
            profile=run.profile,
            ffns=[ffn.name for ffn in checkpoint.ffns],
        )
        digests["statistics"] = run.origin.sha256
    digests["text"] = run.sample.digest
    nonce = secrets.token_hex(8) if config.fresh else None
    inputs: dict[str, Any] = {
        "digests": digests,
        "calibration": recipe.calibration.model_dump(mode="json"),
        "seed": config.seed,
        "profile": run.profile.key_inputs,
        "nonce": nonce,
    }
    if run.own.total:
        inputs["own_rows"] = run.own._asdict()
    if checkpoint.left_out:
        inputs["left_out"] = [ffn.name for ffn in checkpoint.left_out]
    split = _split_inputs(recipe, run.budget, run.solver, layouts=run.layouts)
    run_inputs = inputs | split | {"healing": _healing_inputs(run) if recipe.healing is not None else None}
    run_inputs |= {"evaluations": [key_inputs(task) for task in run.tasks.values()]}
    work = stage_key("run", run_inputs)
    return Keys(
        digests=digests,
        inputs=_named_inputs(run, run_inputs),
        statistics=stage_key("calibrate", inputs),
        work=work,
        run=gated_key(work, run.gates),
        nonce=nonce,
    )


def _named_inputs(run: Run, run_inputs: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each thing that a run's key depends on, by its name for people."""
    named: dict[str, dict[str, Any]] = {
        "model": {"model": run_inputs["digests"]["model"]},
        "tokenizer": {"tokenizer": run_inputs["digests"]["tokenizer"]},
        "calibration data": {
            **{name: run_inputs["digests"].get(name) for name in ("text", "statistics")},
            **{name: run_inputs.get(name) for name in ("own_rows", "seed")},
        },
        "recipe": {name: run_inputs.get(name) for name in ("recipe", "calibration", "left_out")},
        "budget": {"budget": str(run.budget), "latency_table": run_inputs.get("latency_table")},
        "evaluation data": {"evaluations": run_inputs["evaluations"]},
        "gates": {"gates": [str(gate) for gate in run.gates]},
        "device, dtype or threads": {name: run_inputs.get(name) for name in ("profile", "healing")},
        "version of the algorithm": {"algorithm": ALGORITHM_VERSION},
        "--fresh": {"nonce": run_inputs["nonce"]},
    }
    return {name: digest_of(value)[:16] for name, value in named.items()}


def _healing_inputs(run: Run) -> dict[str, int]:
    """Settings outside the recipe that can change the last bits of a healed model."""
    workers = run.config.healing_workers
    return {"threads": run.healing_threads} | ({"workers": workers} if workers > 1 else {})


def _split_inputs(
    recipe: Recipe, budget: Budget, solver: Solver, *, layouts: Sequence[LayerLayout]
) -> dict[str, Any]:
    """The key's part for recipe and budget: the resolved budget, or everything that decides it."""
    told = {"description", "source"}  # they change no result
    inputs: dict[str, Any] = {"recipe": recipe.model_dump(mode="json", exclude=told)}
    if solver.heavy.by == "energy" or recipe.allocation == "search":
        table = None if solver.latency is None else digest_of(solver.latency.model_dump(mode="json"))
        return inputs | {"budget": budget.model_dump(mode="json"), "latency_table": table}
    if budget.kind == "keep":
        return inputs | {"keep": float(budget.limit)}
    kept = solver.model.elements_of(layouts) / solver.model.ffn_elements
    return inputs | {"keep": kept, "layouts": [layout.model_dump(mode="json") for layout in layouts]}
