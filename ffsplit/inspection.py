"""What there is to compress in a model, from its config and safetensors headers alone."""

from __future__ import annotations

from ffsplit.config import Record
from ffsplit.errors import BudgetError
from ffsplit.ffn import FFNShape, LayerLayout
from ffsplit.measurement.size import compressed_size, original_size
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.classifying import may_search
from ffsplit.models.locate import locate_model
from ffsplit.recipes.recipe import load_recipe
from ffsplit.runtime.assemble import is_plain
from ffsplit.splitting.budget import fit_layers
from ffsplit.splitting.solver import stored_layouts

BUDGETS = (0.75, 0.5, 0.3535, 0.25, 0.125)


class BudgetPreview(Record):
    """What one budget would give: the layout of each group's FFNs, and the model's size."""

    keep: float
    layouts: tuple[LayerLayout, ...]
    plain: bool
    num_parameters: int
    num_parameters_without_embeddings: int


class FFNGroup(Record):
    """FFNs that are alike: of one tower, one shape and one activation."""

    what: str
    num_ffns: int
    num_blocks: int
    shape: FFNShape
    activation: str
    num_elements: int


class Inspection(Record):
    """A model's FFNs: their shapes, and their share of all parameters."""

    model_type: str
    architecture: str
    activation: str
    shapes: tuple[FFNShape, ...]
    groups: tuple[FFNGroup, ...]
    num_parameters: int
    num_parameters_without_embeddings: int
    ffn_elements: int
    recipe: str
    budgets: tuple[BudgetPreview, ...]


def inspect_model(model: str, *, recipe: str = "fast") -> Inspection:
    """Look at a model without loading a weight. Raises ConfigError when it is not one to compress."""
    checkpoint = open_checkpoint(locate_model(model).directory)
    chosen = load_recipe(recipe).searching(may_search(checkpoint))
    may_be_plain = chosen.after_healing is None and chosen.allocation == "uniform"
    size = original_size(checkpoint)
    budgets, firsts = [], [indices[0] for indices in _alike(checkpoint).values()]
    for keep in BUDGETS:
        try:
            layouts = fit_layers(checkpoint.shapes, keep=keep, heavy=chosen.heavy, steps=chosen.steps)
        except BudgetError:
            continue
        stored = stored_layouts(layouts, checkpoint.shapes, finish=chosen.after_healing)
        after = compressed_size(checkpoint, layouts, file_bytes=0)
        budgets.append(
            BudgetPreview(
                keep=keep,
                layouts=tuple(stored[first] for first in firsts),
                plain=may_be_plain and is_plain(checkpoint, layouts),
                num_parameters=after.num_parameters,
                num_parameters_without_embeddings=after.num_parameters_without_embeddings,
            )
        )
    return Inspection(
        model_type=checkpoint.architecture.model_type,
        architecture=checkpoint.class_name,
        activation=checkpoint.activation,
        shapes=checkpoint.shapes,
        groups=_groups(checkpoint),
        num_parameters=size.num_parameters,
        num_parameters_without_embeddings=size.num_parameters_without_embeddings,
        ffn_elements=size.ffn_elements,
        recipe=chosen.name,
        budgets=tuple(budgets),
    )


def _alike(checkpoint: Checkpoint) -> dict[tuple[str, FFNShape, str], list[int]]:
    """The indices of FFNs that are alike, by what they are."""
    found: dict[tuple[str, FFNShape, str], list[int]] = {}
    for ffn in checkpoint.ffns:
        expert = "expert" if ffn.expert is not None else ""
        what = " ".join(part for part in (ffn.tower.name, ffn.paths.label, expert) if part)
        key = (what or "layer", ffn.shape, checkpoint.activation_of(ffn.index))
        found.setdefault(key, []).append(ffn.index)
    return found


def _groups(checkpoint: Checkpoint) -> tuple[FFNGroup, ...]:
    return tuple(
        FFNGroup(
            what=what,
            num_ffns=len(indices),
            num_blocks=len({checkpoint.ffns[index].block for index in indices}),
            shape=shape,
            activation=activation,
            num_elements=len(indices) * shape.num_elements,
        )
        for (what, shape, activation), indices in _alike(checkpoint).items()
    )
