"""What cannot be done with every family, said before anything is computed."""

from __future__ import annotations

from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.recipes.recipe import Recipe


def heals(checkpoint: Checkpoint) -> bool:
    """Whether a model can be trained to give its original's outputs.

    It must read one row of text, and its tensors must go by their modules' names in its files.
    """
    if checkpoint.kind not in ("encoder", "causal_lm") or checkpoint.architecture.file_names:
        return False
    return all(ffn.expert is None for ffn in checkpoint.ffns)


def streams(checkpoint: Checkpoint) -> bool:
    """Whether a model can be held one block at a time: it has one list of blocks, and reads text."""
    towers = {ffn.tower for ffn in checkpoint.ffns}
    return len(towers) == 1 and all(tower.is_list and tower.mask for tower in towers)


def check_capabilities(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for what is asked for and cannot be had with this family."""
    family = checkpoint.architecture.model_type
    if (recipe.healing is not None or recipe.after_healing is not None) and not heals(checkpoint):
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing do not work for {family} yet: "
            "take a recipe without, such as fast"
        )
    if config.block_by_block and not streams(checkpoint):
        raise ConfigError(f"--block-by-block is for models with one list of blocks; {family} is none")
