"""The pipeline of a run: its stages in their order, its gates, and its publication."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ffsplit import logs
from ffsplit.calibration.sampling import FAN_IN
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.directories import full_disk_explained, temporary_folder
from ffsplit.distributed import make_runner
from ffsplit.distributed.runner import Runner
from ffsplit.errors import begun
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.keys import stage_key
from ffsplit.measurement.gates import judge, refusal
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.folder import left_out_in_one_line
from ffsplit.models.selection import left_out_ffns
from ffsplit.progress import Expected, Progress, Share, StageLog
from ffsplit.recipes.recipe import Recipe, load_recipe
from ffsplit.report.humanize import dropped_in_words, unchanged_in_words
from ffsplit.run.checks import can_refit, default_text, far_from_evaluation, measures_widths, slow_on_a_gpu
from ffsplit.run.documents import Outcome, experts_record, rounding_note, write_documents
from ffsplit.run.execution import Execution, start
from ffsplit.run.job import Run, would_search
from ffsplit.run.needs import PEAK_MEMORY, in_one_line
from ffsplit.run.stages.calibrate import calibrate, sample_inputs
from ffsplit.run.stages.fit import Layers, compress_layers, refit_layers
from ffsplit.run.stages.generate import with_own_text
from ffsplit.run.stages.heal import heal_checkpoint
from ffsplit.run.stages.measure import measure
from ffsplit.run.stages.reduce import reduce_statistics
from ffsplit.run.stages.search import search
from ffsplit.runtime.assemble import assemble, replace_weights
from ffsplit.runtime.attention_int8 import linears_config, quantize_linears
from ffsplit.splitting.scores import FEWEST_TOKENS, LayerPlan, is_starved, plan_split
from ffsplit.store.artifact import STATISTICS_PATH, locate, read_manifest
from ffsplit.store.entries import MANIFEST_NAME, SIGNATURE_NAME, StoreGuarantees, file_entries
from ffsplit.store.manifest import REPORT_NAME, LinearsRecord, Manifest
from ffsplit.store.publish import Upload, new_attempt_id
from ffsplit.store.scratch import Result, Scratch
from ffsplit.store.signing import sign_manifest
from ffsplit.store.store import Store

MOST_NAMED = 16
"""Maximum number of experts named in one line; the manifest lists all."""


@contextmanager
def connected(run: Run) -> Iterator[Runner]:
    """The run's runner. Raises ConfigError, before anything is written, if it cannot be used."""
    workers = run.needs.machine.num_workers
    with (
        logs.fields(run=run.keys.published(run.kind)),
        make_runner(run.config, workers_here=workers) as runner,
    ):
        yield runner


def make_attempt(
    run: Run,
    runner: Runner,
    scratch: Scratch,
    *,
    store: Store,
    guarantees: StoreGuarantees,
    shown: Progress,
    sign_key: Path | None,
) -> tuple[Manifest, str]:
    """Compute the run, and publish it unless its gates refuse it. Returns its manifest and its report's key.

    Raises ConfigError if the hosts of the cluster are incompatible; nothing is left behind then. Later
    failures are never reported as mistakes in the configuration.
    """
    gpus = run.config.gpus_per_worker if run.profile.device == "cuda" else 0
    log = StageLog(shown, Share(run.profile.threads, gpus, lambda: runner.num_workers))
    log.expect(expected_stages(run))
    with full_disk_explained(), temporary_folder() as folder:
        _announce(run, shown)
        execution = start(run, runner, log, scratch)
        with begun():
            execution = with_own_text(execution)
            attempt = new_attempt_id()
            staging = folder / attempt
            (staging / STATISTICS_PATH).parent.mkdir(parents=True)
            compute = compute_model if run.kind == "model" else compute_statistics
            outcome = replace(compute(execution, staging), guarantees=guarantees, stages=tuple(log.stages))
            if refusal(outcome.gates) is not None:
                manifest = write_documents(
                    run, outcome, staging, attempt=attempt, files=file_entries(staging)
                )
                report = scratch.key(f"refused/{REPORT_NAME}")
                store.put_file(report, staging / REPORT_NAME)
                return manifest, report
            manifest = _publish(run, outcome, staging, store=store, sign_key=sign_key)
            return manifest, f"{manifest.run_key}/{manifest.attempt}/{REPORT_NAME}"


def _announce(run: Run, shown: Progress) -> None:
    """Report what the run needs, its key and budget, and which of the model's files it leaves out."""
    config = run.config
    shown.note(in_one_line(run.needs, asked=config.workers if config.runner == "ray" else None))
    key = run.keys.published(run.kind)
    shown.note(f"run {key}: {run.model} with recipe {run.recipe.name}, {run.budget}")
    for note in (rounding_note(run), default_text(run), slow_on_a_gpu(run), *far_from_evaluation(run)):
        if note is not None:
            shown.note(note)
    if run.kind == "model" and (left_out := left_out_in_one_line(run.left_out)):
        shown.note(left_out)
    if run.own.calibration:
        tokens = run.own.calibration * run.recipe.calibration.row_length
        shown.note(f"the model writes {tokens:,} tokens of the calibration text itself")
    asked = load_recipe(run.config.recipe)
    is_uniform = run.kind == "model" and run.recipe.allocation == "uniform"
    if is_uniform and would_search(run.config, asked, run.checkpoint):
        shown.note("search: kept uniform widths; the original and a candidate do not fit in memory together")
    if run.checkpoint.is_guessed:
        family = run.checkpoint.architecture.model_type
        shown.note(f"{family}: its FFNs are found by structure (docs/models.md says how that was tested)")
    unreached, about = left_out_ffns(run.checkpoint), run.solver.model.ffn_elements
    if unchanged := unchanged_in_words(unreached, ffn_elements=about):
        shown.note(unchanged)
    if unread := run.checkpoint.unread_blocks:
        shown.note(f"warning: config.json states fewer blocks: {', '.join(unread)} are copied unchanged")


def _publish(run: Run, outcome: Outcome, staging: Path, *, store: Store, sign_key: Path | None) -> Manifest:
    """Upload and commit the attempt in `staging`, a folder named after it. Returns the committed manifest."""
    key, attempt = run.keys.published(run.kind), staging.name
    logs.log("publishing", attempt=attempt)
    with Upload(store, run_key=key, attempt=attempt) as upload:
        manifest = write_documents(run, outcome, staging, attempt=attempt, files=upload.add(staging))
        if sign_key is not None:
            data = (staging / MANIFEST_NAME).read_bytes()
            (staging / SIGNATURE_NAME).write_bytes(sign_manifest(data, key=sign_key))
        standing = upload.commit(staging, kind=run.kind, move_latest=run.kind == "model")
    if standing.attempt != attempt:  # another run of the same key committed first
        return read_manifest(locate(f"{store.uri}/{key}"))
    return manifest.at(f"{store.uri}/{key}/{attempt}")


def expected_stages(run: Run) -> tuple[Expected, ...]:
    """The stages that a run will have, by the names that the functions below give them.

    What an estimate covers together counts for the stage that takes most of it.
    """
    seconds = {each.name: each.seconds for each in run.needs.stages}
    stages = [Expected(name, seconds.get(name, 0.0)) for name in _stage_names(run)]
    names = [each.stage for each in stages]
    measured = (seconds.get("measure"), seconds.get(PEAK_MEMORY, 0.0))
    together = {
        "measure": None if None in measured else sum(each or 0.0 for each in measured),
        "refit": None if (refits := seconds.get("refit")) is None else refits / max(1, names.count("refit")),
    }
    return tuple(each._replace(seconds=together.get(each.stage, each.seconds)) for each in stages)


def _stage_names(run: Run) -> Iterator[str]:
    recipe, layouts = run.recipe, run.layouts
    if run.own.total:
        yield "generate"
    yield "calibrate" if run.origin is None else "sample"
    num_rows = len(run.text.calibration) + run.own.calibration
    if run.origin is None and num_rows > FAN_IN * recipe.calibration.rows_per_shard:
        yield "reduce"
    if run.kind == "statistics":
        return
    if recipe.allocation == "search":
        if measures_widths(run.checkpoint, layouts, recipe.steps):
            yield from ("widths", "tables", "tables again")
        yield "allocate"
    yield "compress"
    if can_refit(run.checkpoint, layouts):
        yield from ("sample", "refit") * len(recipe.refits)
    if recipe.healing is not None:
        yield "heal"
    if recipe.after_healing is not None:
        if recipe.samples_again(layouts, run.checkpoint.shapes):
            yield "sample"
        yield "quantize"
    yield "measure"


def compute_statistics(execution: Execution, staging: Path) -> Outcome:
    """Compute neuron statistics into `staging`."""
    shards = calibrate(execution)
    statistics = reduce_statistics(execution, shards, staging / STATISTICS_PATH)
    _report_experts(execution, statistics, layouts=())
    return Outcome(statistics, execution.text, _num_tokens(shards), len(shards))


def compute_model(execution: Execution, staging: Path) -> Outcome:
    """Compute a compressed checkpoint into `staging`, and measure it."""
    run = execution.run
    shards = calibrate(execution)
    statistics = reduce_statistics(execution, shards, staging / STATISTICS_PATH)
    solver, layouts = run.settled(statistics)
    _report_experts(execution, statistics, layouts)
    if (experts := experts_record(run, layouts)) is not None:
        execution.log.note(dropped_in_words(experts))
    part, allocation = "compress", None
    if run.recipe.allocation == "search":
        folder = staging.with_name("candidates")
        found = search(execution, solver, layouts, statistics, shards, folder=folder)
        layouts, allocation, part = found.chosen.layouts, found.record, found.part
    plans = plan_split(statistics, layouts, score=run.recipe.score)
    layers = compress_layers(
        execution, "compress", run.checkpoint, run.recipe.steps, plans, shards, part=part
    )
    layers = refit_layers(execution, layers, shards, staging)
    layers, linears = _finish(execution, layers, shards, staging)
    measured = measure(execution, staging, layers.layouts)
    return Outcome(
        statistics=statistics,
        text=execution.text,
        num_tokens=_num_tokens(shards),
        num_shards=len(shards),
        allocation=allocation,
        plans=tuple(plan.stored_as(layout) for plan, layout in zip(plans, layers.layouts, strict=True)),
        errors=layers.errors,
        linears=linears,
        measurements=measured,
        gates=judge(run.gates, measured),
    )


def _finish(
    execution: Execution, layers: Layers, shards: Sequence[Result], staging: Path
) -> tuple[Layers, LinearsRecord | None]:
    """Assemble the layers in `staging`; heal and then quantize them if the recipe says so."""
    run, recipe = execution.run, execution.run.recipe
    if recipe.healing is None and recipe.after_healing is None:
        assemble(run.checkpoint, layers.files, layers.layouts, staging)
        return layers, None
    whole = staging if recipe.after_healing is None else staging.with_name("healed")
    assemble(run.checkpoint, layers.files, layers.layouts, whole)
    if recipe.healing is not None:
        replace_weights(whole, heal_checkpoint(execution, recipe.healing, whole))
    if recipe.after_healing is None:
        return layers, None
    checkpoint = execution.model.model_copy(update={"path": str(whole), "stored": None}).checkpoint(
        uneven=True
    )
    if recipe.samples_again(layers.layouts, run.checkpoint.shapes):
        key = stage_key("sample", {"run": run.keys.run, "for": "quantize"})
        model = execution.hand_over(whole)
        shards = sample_inputs(execution, model, part="quantize/sample", key=key)
    plans = _quantization_plans(checkpoint, recipe)
    quantized = compress_layers(
        execution, "quantize", checkpoint, (recipe.after_healing,), plans, shards, part="quantize"
    )
    files, record = list(quantized.files), None
    if recipe.linears == "int8":
        added, record = quantize_linears(checkpoint, staging.with_name("linears"), original=run.checkpoint)
        files += added
    linears = None if record is None else linears_config(record.modules)
    assemble(checkpoint, files, quantized.layouts, staging, linears=linears)
    return quantized._replace(errors=layers.errors), record


def _quantization_plans(checkpoint: Checkpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """Plans that keep every neuron, in the integer format that the recipe ends with."""
    assert recipe.after_healing is not None
    plans = []
    for layer, shape in enumerate(checkpoint.shapes):
        dense = LayerLayout.dense(shape)
        layout = recipe.after_healing.plan(
            dense, shape=shape, budget=shape.num_elements, multiple=recipe.width_multiple
        )
        assert layout is not None, "quantization keeps every element"
        neurons = tuple(range(shape.num_neurons))
        plans.append(LayerPlan(layer=layer, layout=layout, heavy_neurons=neurons))
    return tuple(plans)


def _report_experts(
    execution: Execution, statistics: Sequence[NeuronStats], layouts: Sequence[LayerLayout]
) -> None:
    """Report how many tokens the experts saw, and which of those that stay saw too few."""
    names = [ffn.name for ffn in execution.run.checkpoint.ffns]
    dropped = {index for index, layout in enumerate(layouts) if layout.is_dropped}
    line = tokens_of_experts(statistics, names, dropped=dropped)
    if line is not None:
        execution.log.note(line)


def tokens_of_experts(
    statistics: Sequence[NeuronStats], names: Sequence[str], *, dropped: Collection[int] = ()
) -> str | None:
    """One line on how many tokens the experts saw.

    It names those with too few, fewest tokens first, except those that are dropped.
    """
    experts = sorted(
        (stats.num_tokens, index) for index, stats in enumerate(statistics) if stats.expert is not None
    )
    if not experts:
        return None
    line = f"{len(experts)} experts saw {experts[0][0]:,} to {experts[-1][0]:,} tokens each"
    starved = [
        (tokens, index) for tokens, index in experts if index not in dropped and is_starved(statistics[index])
    ]
    if not starved:
        return line
    shown = ", ".join(f"{names[index]} ({tokens})" for tokens, index in starved[:MOST_NAMED])
    more = f" and {len(starved) - MOST_NAMED} more, in the manifest" if len(starved) > MOST_NAMED else ""
    return (
        f"warning: {line}; {len(starved)} saw fewer than {FEWEST_TOKENS} and keep their neurons by weight "
        f"norm: {shown}{more}; give more --samples to score them by their outputs"
    )


def _num_tokens(shards: Sequence[Result]) -> int:
    return sum(int(str(result.facts["num_tokens"])) for result in shards)
