"""Reusing an earlier run's neuron statistics: what must match, and which settings this run inherits.

Raw activations are never published, so the FFN inputs that refits learn from are sampled again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ffsplit.calibration.mixture import parse_source
from ffsplit.calibration.sampling import TextSample
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError
from ffsplit.store.artifact import PublishedStatistics
from ffsplit.store.cache import is_remote
from ffsplit.store.manifest import CalibrationRecord, Compute, StatisticsOrigin


def inherit(config: JobConfig, origin: PublishedStatistics) -> JobConfig:
    """The job, with the earlier run's text and seed unless it was given its own."""
    manifest = origin.manifest
    settings = manifest.recipe.get("calibration", {})
    sources = manifest.calibration.sources
    return config.inheriting(
        calibration=sources if config.has("calibration") else tuple(_found(each, origin) for each in sources),
        seed=manifest.seed,
        samples=manifest.calibration.num_rows if settings.get("max_tokens") else settings.get("samples"),
        max_length=settings.get("max_length"),
    )


def _found(source: str, origin: PublishedStatistics) -> str:
    """A text of the earlier run. Local files are recorded by name: look here, then beside its store."""
    parsed = parse_source(source)
    if parsed.is_own:
        return source
    share = source.removeprefix(parsed.spec)
    match = re.fullmatch(r"((?:[A-Za-z][\w+.-]+:)?)(.*?)(#.*)?", parsed.spec, re.DOTALL)
    assert match is not None
    scheme, path, column = match[1], match[2], match[3] or ""
    if scheme in ("builtin:", "hf:") or path.startswith("//") or Path(path).exists():
        return source
    for folder in () if is_remote(origin.uri) else Path(origin.uri).parents[:3]:
        if (folder / path).exists():
            return f"{scheme}{folder / path}{column}{share}"
    raise ConfigError(
        f"--stats {origin.uri} was collected on {path}, which is neither here nor beside that run: "
        "give it, or another text, as --calibration"
    )


def check_origin(
    origin: PublishedStatistics,
    *,
    digests: Mapping[str, str],
    revision: str | None,
    profile: ComputeProfile,
    ffns: Sequence[str],
) -> None:
    """Raise ConfigError unless the model, its FFNs, the tokenizer and the compute profile are the same."""
    model, where = origin.manifest.model, f"--stats {origin.uri}"
    fix = "give a run of this model, or leave --stats out"
    if model.digest != digests["model"]:
        theirs, ours = _name(model.id, model.revision), f"revision {revision}" if revision else "this one"
        raise ConfigError(f"{where} is of another model or revision, {theirs}, not {ours}: {fix}")
    if model.tokenizer_digest != digests["tokenizer"]:
        raise ConfigError(
            f"{where} was collected with another tokenizer or other files beside the weights: {fix}"
        )
    if [layer.name for layer in origin.manifest.layers] != list(ffns):
        raise ConfigError(
            f"{where} is of other FFNs of this model: give the same --only and --skip, or leave --stats out"
        )
    theirs, ours = (_describe(each) for each in (origin.manifest.compute, profile))
    if theirs != ours:
        raise ConfigError(
            f"{where} was computed on {theirs}, but this run is on {ours}: give the same --device, --dtype, "
            "--threads-per-worker and --attn-implementation, or leave --stats out"
        )


def check_weighs_experts(origin: PublishedStatistics) -> None:
    """Raise ConfigError unless the statistics tell how the router weighted each expert."""
    if all(layer.router_weighted_norm is None for layer in origin.manifest.layers):
        raise ConfigError(
            f"--stats {origin.uri} does not say how the router weighted each expert, so none can be dropped: "
            "leave --stats out"
        )


def calibration_record(origin: PublishedStatistics, *, text: TextSample) -> CalibrationRecord:
    """What the statistics were collected on, and this run's held-out rows."""
    manifest = origin.manifest
    return manifest.calibration.model_copy(
        update={
            "held_out_rows": len(text.held_out),
            "held_out_is_disjoint": text.held_out_is_disjoint,
            "statistics_from": StatisticsOrigin(
                uri=origin.uri,
                run_key=manifest.run_key,
                attempt=manifest.attempt,
                sha256=origin.sha256,
                sampled_text_digest=text.digest,
            ),
        }
    )


def _name(model: str, revision: str | None) -> str:
    return f"{model} at {revision}" if revision else model


def _describe(profile: ComputeProfile | Compute) -> str:
    attention = f" and {profile.attn_implementation} attention" if profile.attn_implementation else ""
    return f"{profile.device} in {profile.dtype} with {profile.threads} threads{attention}"
