"""The shipped recipes with fits of a few steps: hundreds of them run the same code over and over."""

from __future__ import annotations

from ffsplit.compressors import AnyCompressor, DistillCompressor
from ffsplit.recipes.recipe import Recipe, load_recipe

NUM_STEPS = 20


def short_recipe(name: str) -> Recipe:
    """A shipped recipe whose layers are fitted for a moment only."""
    recipe = load_recipe(name)
    return recipe.model_copy(update={"steps": tuple(_short(step) for step in recipe.steps)})


def _short(step: AnyCompressor) -> AnyCompressor:
    return step.model_copy(update={"num_steps": NUM_STEPS}) if isinstance(step, DistillCompressor) else step
