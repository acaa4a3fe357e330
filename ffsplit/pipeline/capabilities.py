"""What cannot be done with every family, said before anything is computed."""

from __future__ import annotations

from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.recipes.recipe import Recipe


def check_capabilities(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for what is asked for and cannot be had with this family."""
    family = checkpoint.architecture.model_type
    if (
        recipe.healing is not None or recipe.after_healing is not None
    ) and not checkpoint.architecture.can_heal:
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing do not work for {family} yet: "
            "take a recipe without, such as fast"
        )
    if config.block_by_block and not checkpoint.architecture.can_stream:
        raise ConfigError(f"--block-by-block is for models with one list of blocks; {family} is none")
