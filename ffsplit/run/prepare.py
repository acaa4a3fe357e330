"""A job that may begin: every digest taken, and the keys of its results."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ffsplit.calibration.sampling import TextSample
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.config import Budget, JobConfig
from ffsplit.errors import explained
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.keys import digest_of, stage_key
from ffsplit.machine import usable_cores
from ffsplit.measurement.gates import Gate, gated_key
from ffsplit.measurement.tasks.evaluations import Evaluation, evaluations_of, key_inputs
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import check_complete
from ffsplit.models.load_options import attending, attention_advice, trusting
from ffsplit.profile import ComputeProfile
from ffsplit.recipes.recipe import Recipe
from ffsplit.run.checks import readable
from ffsplit.run.estimate import estimate
from ffsplit.run.examine import Examined, examine
from ffsplit.run.needs import Preflight
from ffsplit.run.origin import check_origin
from ffsplit.splitting.scores import num_energetic
from ffsplit.splitting.solver import Solver
from ffsplit.store.commits import Kind
from ffsplit.store.entries import LeftOut, check_outside_attempts
from ffsplit.store.inputs import StoredFiles
from ffsplit.store.locate import PublishedStatistics
from ffsplit.store.store import open_store


@dataclass(frozen=True)
class Identity:
    """The names of a run's results, and the digests that they are made from.

    `work_key` names what is computed, and so its scratch; `run_key` is the same, or where there are
    gates, the hash of it and them.
    """

    digests: dict[str, str]
    calibration_key: str
    work_key: str
    run_key: str
    nonce: str | None

    def keys(self, kind: Kind) -> tuple[str, str]:
        """What the result is published under, and what its scratch is."""
        return (self.run_key, self.work_key) if kind == "model" else (self.calibration_key,) * 2


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: what it starts from, and the keys of its results.

    `layouts` are what the budget comes to; where the statistics have a say in that, they are the least it
    can come to until the statistics are there. `checkpoint` is in a directory of this
    machine; where the model is in a store, other nodes have theirs from `stored_model`. `text` is what is
    read of the sample, and so is its digest. `flight` says what of the model is held at a time. `left_out`
    is what of the model's folder does not come along.
    """

    config: JobConfig
    recipe: Recipe
    budget: Budget
    solver: Solver
    checkpoint: Checkpoint
    stored_model: StoredFiles | None
    left_out: tuple[LeftOut, ...]
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
    flight: Preflight
    nonce: str | None


def prepare(config: JobConfig, *, kind: Kind = "model") -> PreparedRun:
    """Resolve and check a job. Raises ConfigError for whatever the user can mend; writes nothing.

    What cannot fit is refused before any weight is read.
    """
    with trusting(config.trust_remote_code), attending(config.attn_implementation):
        job = examine(config, kind=kind)
        flight = estimate(job, kind=kind)
        flight.check()
        return complete(job, identify(job), flight)


def preflight(config: JobConfig, *, kind: Kind = "model") -> Preflight:
    """What a run would need, by its checked settings. Raises ConfigError as `prepare` does."""
    check_outside_attempts(open_store(config.out).uri, flag="--out")
    with trusting(config.trust_remote_code), attending(config.attn_implementation):
        job = examine(config, kind=kind)
        readable(job.text, settings=job.recipe.calibration, checkpoint=job.checkpoint)
        flight = estimate(job, kind=kind)
        if attention_advice(job.checkpoint.config):  # whether this one is there, only loading tells
            check_complete(job.checkpoint)
        return flight


@explained("the job cannot be checked")
def identify(job: Examined) -> Identity:
    """Name a run's results by every byte that it starts from.

    How much of the sample is read follows from it, the tokenizer and the settings, which are all in the
    keys: no row has to be tokenized to know them.
    """
    config, recipe, checkpoint = job.config, job.recipe, job.checkpoint
    digests = {"model": checkpoint.model_digest(), "tokenizer": checkpoint.tokenizer_digest()}
    if job.origin is not None:
        check_origin(job.origin, digests=digests, revision=job.revision, profile=job.profile)
        digests["statistics"] = job.origin.sha256
    digests["text"] = job.text.digest
    nonce = secrets.token_hex(8) if config.fresh else None
    inputs: dict[str, Any] = {
        "digests": digests,
        "calibration": recipe.calibration.model_dump(mode="json"),
        "seed": config.seed,
        "profile": job.profile.key_inputs,
        "nonce": nonce,
    }
    healing = healing_inputs(config) if recipe.healing is not None else None
    split = split_inputs(recipe, job.budget, job.solver, layouts=job.layouts)
    run_inputs = inputs | split | {"healing": healing}
    run_inputs |= {"evaluations": [key_inputs(task) for task in job.tasks.values()]}
    work_key = stage_key("run", run_inputs)
    return Identity(
        digests=digests,
        calibration_key=stage_key("calibrate", inputs),
        work_key=work_key,
        run_key=gated_key(work_key, job.gates),
        nonce=nonce,
    )


@explained("the job cannot be checked")
def complete(job: Examined, identity: Identity, flight: Preflight) -> PreparedRun:
    """What a run needs beside its name, and what needs no second look where its result stands.

    Loads the tokenizer. Raises ConfigError where the model cannot read the rows.
    """
    text = readable(job.text, settings=job.recipe.calibration, checkpoint=job.checkpoint)
    known = {field.name: getattr(job, field.name) for field in fields(job) if field.name != "tasks"}
    known |= {field.name: getattr(identity, field.name) for field in fields(identity)}
    known |= {
        "recipe": job.recipe.timing([gate.shape for gate in job.gates if gate.shape]),
        "text": text,
        "digests": identity.digests | {"text": text.digest},
    }
    evaluations = evaluations_of(job.tasks, calibration=text.calibration)
    return PreparedRun(**known, evaluations=evaluations, flight=flight)


@explained("the job cannot be checked")
def check_weights(checkpoint: Checkpoint, *, block_by_block: bool) -> None:
    """What else must hold before a run begins, and needs no second look either.

    Loads the modelling code of the model's family. Raises ConfigError where weights are missing or not
    finite, UnsupportedModelError where FFNs were guessed wrongly.
    """
    check_complete(checkpoint)
    if checkpoint.is_guessed:
        from ffsplit.runtime.trial import check_by_trial

        check_by_trial(checkpoint, block_by_block=block_by_block)


def settle(run: PreparedRun, statistics: Sequence[NeuronStats]) -> PreparedRun:
    """The run with the layouts that its budget comes to now that the statistics are there."""
    solver = replace(run.solver, num_energetic=num_energetic(run.recipe.heavy, statistics))
    layouts = run.layouts if solver.num_energetic is None else solver.solve(run.budget)
    return replace(run, solver=solver, layouts=layouts)


def healing_threads(config: JobConfig) -> int:
    """The threads of each worker that heals. They can change the result's last bits.

    By default the cores that the driver may use, shared out: with more threads than a quota has cores,
    every step would wait for those that are stopped.
    """
    return config.healing_threads or max(1, usable_cores() // config.healing_workers)


def healing_inputs(config: JobConfig) -> dict[str, int]:
    """What of the job, beside the recipe, can change the last bits of a healed model."""
    workers = {"workers": config.healing_workers} if config.healing_workers > 1 else {}
    return {"threads": healing_threads(config)} | workers


def split_inputs(
    recipe: Recipe, budget: Budget, solver: Solver, *, layouts: Sequence[LayerLayout]
) -> dict[str, Any]:
    """The run key's part on the recipe and the budget: what that resolves to, or all that decides it."""
    inputs: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if solver.heavy.by == "energy" or recipe.allocation == "search":
        table = None if solver.latency is None else digest_of(solver.latency.model_dump(mode="json"))
        return inputs | {"budget": budget.model_dump(mode="json"), "latency_table": table}
    if budget.kind == "keep":
        return inputs | {"keep": float(budget.limit)}
    kept = solver.model.elements_of(layouts) / solver.model.ffn_elements
    return inputs | {"keep": kept, "layouts": [layout.model_dump(mode="json") for layout in layouts]}
