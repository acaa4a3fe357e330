"""The documents of an artifact: its model card, its report and its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ffsplit import __version__
from ffsplit.calibration.sampling import TextSample
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.calibration.statistics_file import read_statistics
from ffsplit.directories import by_name, user_path
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.machine import describe_environment
from ffsplit.measurement.gates import describe_result
from ffsplit.models.fetch import model_name
from ffsplit.models.folder import CARD_NAME, ORIGINAL_CARD
from ffsplit.models.selection import left_out_ffns
from ffsplit.redaction import redacted, without_credentials
from ffsplit.report.html import render_report
from ffsplit.report.humanize import (
    calibrated_in_words,
    dropped_in_words,
    load_in_words,
    noise,
    number,
    rounding_in_words,
    spread_in_words,
    times,
    unchanged_in_words,
)
from ffsplit.report.plots import energy_curve
from ffsplit.run.job import Run
from ffsplit.run.reused_statistics import calibration_record
from ffsplit.runtime.assemble import is_plain
from ffsplit.splitting.scores import (
    LayerPlan,
    energy_counts,
    energy_share,
    is_starved,
    output_energy,
    router_weighted_norm,
)
from ffsplit.store.artifact import STATISTICS_PATH, locate, read_manifest
from ffsplit.store.entries import (
    MANIFEST_NAME,
    FileEntry,
    StoreGuarantees,
    check_outside_attempts,
    file_entry,
)
from ffsplit.store.manifest import (
    REPORT_NAME,
    AllocationRecord,
    CalibrationRecord,
    Compute,
    DroppedExperts,
    ExpertsRecord,
    GateResult,
    Latency,
    LayerRecord,
    LinearsRecord,
    Manifest,
    Measurements,
    SourceModel,
    Stage,
)
from ffsplit.store.pull import materialize


@dataclass(frozen=True)
class Outcome:
    """What a run computed. A run of statistics alone has no plans, errors or measurements."""

    statistics: tuple[NeuronStats, ...]
    text: TextSample
    num_tokens: int
    num_shards: int
    plans: tuple[LayerPlan, ...] = ()
    errors: tuple[float | None, ...] = ()
    measurements: Measurements | None = None
    gates: tuple[GateResult, ...] = ()
    allocation: AllocationRecord | None = None
    linears: LinearsRecord | None = None
    guarantees: StoreGuarantees | None = None
    stages: tuple[Stage, ...] = ()


def write_documents(
    run: Run,
    outcome: Outcome,
    directory: Path,
    *,
    attempt: str,
    files: Sequence[FileEntry],
) -> Manifest:
    """Write the card, the report and, last, the manifest, beside the files that are in the directory."""
    manifest = _draft(run, outcome, attempt=attempt).listing(files)

    def add(name: str, text: str) -> Manifest:
        (directory / name).write_text(text, "utf-8")
        return manifest.listing([*manifest.files, file_entry(directory / name, name)])

    if run.kind == "model":
        manifest = add(CARD_NAME, model_card(manifest))
    manifest = add(REPORT_NAME, report_of(manifest, outcome.statistics))
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return manifest


def report_of(manifest: Manifest, statistics: Sequence[NeuronStats]) -> str:
    """The HTML report of an artifact."""
    curves = [
        energy_curve(record.layer, output_energy(stats), name=record.name)
        for record, stats in zip(manifest.layers, statistics, strict=True)
        if not is_starved(stats)
    ]
    return render_report(manifest, curves=curves)


def _draft(run: Run, outcome: Outcome, *, attempt: str) -> Manifest:
    checkpoint, keys, is_model = run.checkpoint, run.keys, run.kind == "model"
    manifest = Manifest(
        kind=run.kind,
        run_key=keys.published(run.kind),
        attempt=attempt,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ffsplit_version=__version__,
        plain=is_plain(checkpoint, [plan.layout for plan in outcome.plans]) if is_model else None,
        seed=run.config.seed,
        compute=_compute(run),
        recipe=run.recipe.model_dump(mode="json"),
        keep=run.kept([plan.layout for plan in outcome.plans]) if is_model else None,
        keep_unrounded=run.kept_unrounded(outcome.statistics) if is_model else None,
        budget=run.budget if is_model else None,
        nonce=keys.nonce,
        model=SourceModel(
            id=model_name(run.model),
            revision=run.located.revision,
            digest=keys.digests["model"],
            tokenizer_digest=keys.digests["tokenizer"],
            model_type=checkpoint.architecture.model_type,
            architecture=checkpoint.class_name,
            license=checkpoint.folder.license,
            shape=run.solver.model,
            left_out=run.left_out if is_model else (),
            left_out_ffns=left_out_ffns(checkpoint),
        ),
        calibration=_calibration(run, outcome),
        layers=tuple(_layers(run, outcome)),
        experts=experts_record(run, [plan.layout for plan in outcome.plans]) if is_model else None,
        allocation=outcome.allocation,
        linears=outcome.linears,
        measurements=outcome.measurements,
        gates=outcome.gates,
        stages=outcome.stages,
        environment=describe_environment(),
        store=outcome.guarantees,
        files=(),
    )
    config = run.config
    given = (run.model, config.model, config.out, config.recipe, config.latency_table, config.stats)
    named = by_name(manifest, given=(*given, *config.calibration, *config.eval))
    return without_credentials(named)


def _compute(run: Run) -> Compute:
    profile, heals = run.profile, run.recipe.healing is not None
    return Compute(
        device=profile.device,
        dtype=profile.dtype,
        threads=profile.threads,
        healing_threads=run.healing_threads if heals else None,
        healing_workers=run.config.healing_workers if heals else None,
        attn_implementation=profile.attn_implementation,
        trust_remote_code=run.config.trust_remote_code,
    )


def _calibration(run: Run, outcome: Outcome) -> CalibrationRecord:
    text = outcome.text
    if run.origin is not None:
        return calibration_record(run.origin, text=text)
    return CalibrationRecord(
        sources=run.config.calibration,
        text_digest=text.digest,
        num_rows=len(text.calibration),
        own_rows=run.own.calibration,
        num_tokens=outcome.num_tokens,
        max_length=run.recipe.calibration.row_length,
        num_shards=outcome.num_shards,
        held_out_rows=len(text.held_out),
        held_out_is_disjoint=text.held_out_is_disjoint,
    )


def rounding_note(run: Run) -> str | None:
    """One line on the widths of a run's uniform layers, and what the budget gives up to rounding.

    None if it gives up nothing, or the statistics decide.
    """
    if run.kind != "model" or run.solver.heavy.by == "energy":
        return None
    shapes = run.solver.model.shapes
    return rounding_in_words(run.layouts, shapes, keep=run.kept(run.layouts), unrounded=run.kept_unrounded())


def experts_record(run: Run, layouts: Sequence[LayerLayout]) -> ExpertsRecord | None:
    """Which experts these layouts drop; None if they drop none."""
    mixture = run.solver.model.mixture
    if mixture is None or not (num_dropped := mixture.num_dropped(layouts)):
        return None
    return ExpertsRecord(
        num_experts=mixture.num_experts,
        num_kept=mixture.num_experts - num_dropped,
        dropped=tuple(
            DroppedExperts(
                block=run.checkpoint.ffns[first].name.removesuffix(" expert 0"),
                experts=tuple(
                    index - first for index in mixture.experts_of(first) if layouts[index].is_dropped
                ),
            )
            for first in mixture.firsts
        ),
    )


def _layers(run: Run, outcome: Outcome) -> list[LayerRecord]:
    records = []
    shapes, itemsize = run.checkpoint.shapes, run.checkpoint.itemsize
    for layer, (stats, shape) in enumerate(zip(outcome.statistics, shapes, strict=True)):
        plan = outcome.plans[layer] if outcome.plans else None
        layout = plan.layout if plan is not None else LayerLayout.dense(shape)
        starved = is_starved(stats)
        records.append(
            LayerRecord(
                layer=layer,
                layout=layout,
                num_heavy_hitters=plan.num_heavy_hitters if plan is not None else 0,
                num_elements=layout.num_elements(shape),
                size_bytes=layout.size_bytes(shape, itemsize),
                relative_error=outcome.errors[layer] if outcome.errors else None,
                energy_in_top_5_percent=None if starved else energy_share(stats, fraction=0.05),
                neurons_for_energy=None if starved else energy_counts(stats),
                name=run.checkpoint.ffns[layer].name,
                num_tokens=stats.num_tokens,
                by_weight_norm=starved,
                router_weighted_norm=None if stats.sum_weighted_norm is None else router_weighted_norm(stats),
            )
        )
    return records


def _loader(class_name: str) -> str:
    """The class of transformers that loads a model with its head; AutoModel for a model's own code."""
    import transformers

    return class_name if hasattr(transformers, class_name) else "AutoModel"


def model_card(manifest: Manifest) -> str:
    """The artifact's README.md: licence and origin, what was done to it, how to load it, its figures."""
    model, measured = manifest.model, manifest.measurements
    assert measured is not None, "no model is published unmeasured"
    front = ["---", f"base_model: {model.id}", "library_name: transformers", "tags: [ffsplit, compressed]"]
    front += [f"license: {model.license}"] if model.license else []
    loader = f"{_loader(model.architecture)}.from_pretrained(directory)"
    how = (
        f"An ordinary checkpoint: `transformers.{loader}` loads it."
        if manifest.plain
        else f"`import ffsplit`, then `transformers.{loader}`; without ffsplit the load fails."
    )
    body = [
        f"# {model.id}, compressed with FFSplit",
        "",
        f"The feed-forward networks keep {manifest.keep:.4g} of their elements (recipe "
        f"`{manifest.recipe['name']}`: {manifest.recipe['description']})",
        "",
        how,
    ]
    body += ["", calibrated_in_words(manifest.calibration)]
    if unchanged := unchanged_in_words(model.left_out_ffns, ffn_elements=model.shape.ffn_elements):
        body += ["", unchanged]
    if manifest.experts is not None:
        body += ["", dropped_in_words(manifest.experts)]
    if manifest.linears is not None:
        sizes = f"{manifest.linears.original_size_bytes:,} bytes became {manifest.linears.size_bytes:,}"
        body += ["", f"The linear layers of attention have int8 weights: {sizes}."]
    before, after = measured.original_size, measured.compressed_size
    body += ["", "| | original | compressed | |", "|---|---|---|---|"]
    body += [f"| parameters | {before.num_parameters:,} | {after.num_parameters:,} | |"]
    body += [f"| bytes | {before.file_bytes:,} | {after.file_bytes:,} | |"]
    body += [_card_latency(each) for each in measured.latency]
    body += [
        f"| {task.name}, {task.metric} | {task.original:.4f} | {task.compressed:.4f} | |"
        for task in measured.tasks
    ]
    body += ["", *(f"- {name}: {value:.5f}" for name, value in measured.fidelity.items())]
    if measured.load is not None:
        body += ["", f"Timed on {measured.device}, {measured.dtype}: {load_in_words(measured.load)}."]
    if disturbed := noise(measured.latency, measured.load):
        body += ["", f"**{disturbed[0].upper()}{disturbed[1:]}.**"]
    if manifest.gates:
        body += ["", *(f"- {describe_result(result)}" for result in manifest.gates)]
    if any(entry.path == ORIGINAL_CARD for entry in manifest.files):
        body += ["", f"The original's card: [{ORIGINAL_CARD}]({ORIGINAL_CARD})."]
    if model.left_out:
        body += ["", "These files of the original are not included:", ""]
        body += [f"- `{each.path}`: {each.reason}" for each in model.left_out]
    return "\n".join([*front, "---", "", *body, ""])


def _card_latency(each: Latency) -> str:
    """One row: both medians, their ratio, and how much single pairs vary."""
    before, after = (number(ms) for ms in (each.original_p50_ms, each.compressed_p50_ms))
    ratio = times(each.speedup) + (f" ({spread_in_words(each.spread)})" if each.spread else "")
    return f"| forward {each.batch_size} x {each.num_tokens}, p50 ms | {before} | {after} | {ratio} |"


def render_published(uri: str, *, out: str) -> Path:
    """Write the report of a published artifact to a file, from its manifest and statistics."""
    directory = materialize(uri)
    manifest = read_manifest(locate(uri))
    target = user_path(out)
    check_outside_attempts(target.resolve().as_posix(), flag="--out")
    page = redacted(report_of(manifest, read_statistics(directory / STATISTICS_PATH)))
    try:
        target.write_text(page, "utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    return target
