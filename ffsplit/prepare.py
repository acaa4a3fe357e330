"""Everything that is checked and known before a run computes anything."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffsplit.calibration.batches import tokenize_rows
from ffsplit.calibration.sampling import TextSample, passages, sample_texts
from ffsplit.calibration.sources import read_all
from ffsplit.config import JobConfig, stage_key
from ffsplit.errors import ConfigError
from ffsplit.ffn import LayerLayout
from ffsplit.measurement.tasks.evaluations import Evaluation, read_evaluations
from ffsplit.models.activations import activation_named
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_tokenizer
from ffsplit.models.locate import locate_model
from ffsplit.recipes.recipe import Recipe, load_recipe
from ffsplit.splitting.budget import fit_layers
from ffsplit.stages.profile import ComputeProfile

CHARACTERS_PER_TOKEN = 6
"""More than English text has, so that a causal model's rows are cut by the tokenizer, not too short."""


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: what it starts from, and the keys of its results."""

    config: JobConfig
    recipe: Recipe
    keep: float
    checkpoint: Checkpoint
    revision: str | None
    digests: dict[str, str]
    text: TextSample
    evaluations: tuple[Evaluation, ...]
    profile: ComputeProfile
    layouts: tuple[LayerLayout, ...]
    calibration_key: str
    run_key: str
    nonce: str | None


def prepare(config: JobConfig) -> PreparedRun:
    """Resolve and check a job. Raises ConfigError for whatever the user can mend; writes nothing."""
    recipe = resolve_recipe(config)
    profile = ComputeProfile.resolve(config)
    directory, revision = locate_model(config.model, revision=config.revision)
    checkpoint = open_checkpoint(directory)
    activation_named(checkpoint.activation)
    keep = recipe.keep if config.keep is None else config.keep
    layouts = fit_layers(checkpoint.shapes, keep=keep, heavy_share=recipe.heavy_share, steps=recipe.steps)
    text = sample_rows(config.calibration, recipe=recipe, checkpoint=checkpoint, seed=config.seed)
    check_rows(text.calibration, checkpoint=checkpoint, max_length=recipe.calibration.max_length)
    evaluations = read_evaluations(
        config.eval, checkpoint=checkpoint, calibration=text.calibration, max_length=config.max_length
    )
    digests = {
        "model": checkpoint.model_digest(),
        "tokenizer": checkpoint.tokenizer_digest(),
        "text": text.digest,
    }
    nonce = secrets.token_hex(8) if config.fresh else None
    inputs: dict[str, Any] = {
        "digests": digests,
        "calibration": recipe.calibration.model_dump(mode="json"),
        "seed": config.seed,
        "profile": profile.model_dump(mode="json"),
        "nonce": nonce,
    }
    run_inputs = inputs | {"recipe": recipe.model_dump(mode="json"), "keep": keep}
    run_inputs |= {"evaluations": [evaluation.key_inputs for evaluation in evaluations]}
    return PreparedRun(
        config=config,
        recipe=recipe,
        keep=keep,
        checkpoint=checkpoint,
        revision=revision,
        digests=digests,
        text=text,
        evaluations=evaluations,
        profile=profile,
        layouts=layouts,
        calibration_key=stage_key("calibrate", inputs),
        run_key=stage_key("run", run_inputs),
        nonce=nonce,
    )


def resolve_recipe(config: JobConfig) -> Recipe:
    """The recipe with the flags that override it."""
    recipe = load_recipe(config.recipe)
    given = {"samples": config.samples, "max_length": config.max_length}
    changes = {name: value for name, value in given.items() if value is not None}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})


def sample_rows(specs: Sequence[str], *, recipe: Recipe, checkpoint: Checkpoint, seed: int) -> TextSample:
    """Calibration and held-out rows: a text each, or a window of running text for a causal LM."""
    texts = read_all(specs)
    settings = recipe.calibration
    if checkpoint.architecture.kind == "causal_lm":
        texts = passages(texts, max_characters=settings.max_length * CHARACTERS_PER_TOKEN)
    return sample_texts(texts, num_samples=settings.samples, num_held_out=settings.held_out, seed=seed)


def check_rows(rows: Sequence[str], *, checkpoint: Checkpoint, max_length: int) -> None:
    """Raise ConfigError when rows are longer than the model reads, or none has a token to learn from."""
    longest = checkpoint.max_positions
    if longest is not None and max_length > longest:
        raise ConfigError(f"--max-length {max_length} is more than the model's {longest} positions")
    tokenizer = load_tokenizer(checkpoint)
    for start in range(0, len(rows), 256):
        if tokenize_rows(tokenizer, rows[start : start + 256], max_length=max_length):
            return
    raise ConfigError(
        f"the calibration text is nothing but padding and special tokens at --max-length {max_length}: "
        "give other text or a larger --max-length"
    )


def model_name(model: str) -> str:
    """What to call a model in a report: a hub id, or a local directory's own name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
