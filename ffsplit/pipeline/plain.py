"""What has to be an ordinary checkpoint, and is refused before a run where it would not be."""

from __future__ import annotations

from collections.abc import Sequence

from ffsplit.errors import ConfigError
from ffsplit.ffn import LayerLayout
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.recipes.recipe import Recipe
from ffsplit.runtime.assemble import is_plain, keeps_names


def check_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError when a recipe would heal, or quantize afterwards, more than a narrower model."""
    if not keeps_names(checkpoint, layouts):
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing need steps that leave one dense FFN "
            "a layer, without a bias that the architecture lacks: prune or distill"
        )


def can_refit(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether the compressed FFNs are read as the original's are, and see the same tokens.

    Experts do not: which tokens are sent to them can change.
    """
    return keeps_names(checkpoint, layouts) and not checkpoint.has_experts


def check_stays_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError when the result of --plain would not be an ordinary checkpoint."""
    if recipe.allocation == "search":
        reason = "its search may give FFNs different widths"
    elif recipe.heavy.by == "energy":
        reason = "its rule by energy may give FFNs different widths"
    elif recipe.after_healing is not None:
        reason = "it ends with integer weights"
    elif not is_plain(checkpoint, layouts):
        reason = "it leaves more than one dense FFN of one width a layer, or a bias that the family lacks"
    else:
        return
    raise ConfigError(f"--plain: recipe {recipe.name} does not stay plain, {reason}: take fast or norm-prune")
