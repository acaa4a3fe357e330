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
from ffsplit.models.fetch import model_name
from ffsplit.models.load_options import loading_class
from ffsplit.models.selection import left_out_ffns
from ffsplit.models.source_card import CARD_NAME, read_card
from ffsplit.redaction import redacted, without_credentials
from ffsplit.report.card import model_card
from ffsplit.report.html import render_report
from ffsplit.report.humanize import rounding_in_words
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
        manifest = add(CARD_NAME, model_card(manifest, original=read_card(directory)))
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
        inputs=keys.inputs,
        model=SourceModel(
            id=model_name(run.model),
            revision=run.located.revision,
            digest=keys.digests["model"],
            tokenizer_digest=keys.digests["tokenizer"],
            model_type=checkpoint.architecture.model_type,
            architecture=checkpoint.class_name,
            loading_class=loading_class(
                checkpoint.class_name,
                model_type=checkpoint.architecture.model_type,
                where=checkpoint.directory,
            ),
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


def render_published(uri: str, *, out: str) -> Path:
    """Write the report of a published artifact to a file, from its manifest and statistics."""
    location = locate(uri)
    directory, manifest = materialize(location.uri), read_manifest(location)
    target = user_path(out)
    check_outside_attempts(target.resolve().as_posix(), flag="--out")
    page = redacted(report_of(manifest, read_statistics(directory / STATISTICS_PATH)))
    try:
        target.write_text(page, "utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    return target
