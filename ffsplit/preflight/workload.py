"""A run in numbers: how large the model and its parts are, and how much text goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ffsplit.calibration.sampling import TextSample
from ffsplit.ffn import FFNShape, LayerLayout
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.recipes.recipe import Recipe
from ffsplit.splitting.solver import stored_layouts

CHARACTERS_PER_TOKEN = 4
"""Of English text, for a guess; a row is never longer than the recipe's row_length."""
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Workload:
    """Elements are parameters; `itemsize` is the bytes of one in the dtype that is computed in.

    `text` is the sample; of rows of text as many are read as the recipe's tokens allow, by a guess here.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    layouts: tuple[LayerLayout, ...]
    text: TextSample
    itemsize: int

    @cached_property
    def file_bytes(self) -> int:
        return self.checkpoint.num_bytes

    @cached_property
    def num_elements(self) -> int:
        return sum(info.num_elements for info in self.checkpoint.tensors.values())

    @cached_property
    def elements_by_block(self) -> tuple[int, ...]:
        checkpoint = self.checkpoint
        return tuple(
            sum(checkpoint.tensors[name].num_elements for name in checkpoint.block_tensors(block))
            for block in checkpoint.blocks
        )

    @property
    def block_elements(self) -> int:
        """Of the largest block."""
        return max(self.elements_by_block)

    @property
    def outside_elements(self) -> int:
        """Of embeddings, heads and whatever else is in no block."""
        return self.num_elements - sum(self.elements_by_block)

    @property
    def num_logits(self) -> int:
        """A token, where fidelity compares logits."""
        return self.checkpoint.vocab_size if self.checkpoint.compared_as == "causal_lm" else 0

    @property
    def num_blocks(self) -> int:
        return len(self.checkpoint.blocks)

    @property
    def num_ffns(self) -> int:
        return len(self.checkpoint.shapes)

    @cached_property
    def shape(self) -> FFNShape:
        """Of the largest FFN."""
        return max(self.checkpoint.shapes, key=lambda shape: shape.num_elements)

    @cached_property
    def kept(self) -> float:
        """The share of the FFNs' elements that stays."""
        shapes = self.checkpoint.shapes
        elements = sum(layout.num_elements(shape) for layout, shape in zip(self.layouts, shapes, strict=True))
        return elements / sum(shape.num_elements for shape in shapes)

    @cached_property
    def kept_neurons(self) -> int:
        return max(layout.num_neurons for layout in self.layouts)

    @cached_property
    def compressed_bytes(self) -> int:
        """Of the compressed checkpoint's weights, before the recipe ends with fewer bits."""
        return self._bytes_with(self.layouts)

    @cached_property
    def artifact_bytes(self) -> int:
        """Of the weights that are published. Attention's, which may get fewer bits too, count in full."""
        finish = self.recipe.after_healing
        return self._bytes_with(stored_layouts(self.layouts, self.checkpoint.shapes, finish=finish))

    def _bytes_with(self, layouts: Sequence[LayerLayout]) -> int:
        shapes, itemsize = self.checkpoint.shapes, self.checkpoint.itemsize
        ffns = sum(layout.size_bytes(shape, itemsize) for layout, shape in zip(layouts, shapes, strict=True))
        return self.file_bytes - sum(shape.num_elements for shape in shapes) * itemsize + ffns

    @property
    def batch_tokens(self) -> int:
        settings = self.recipe.calibration
        return max(settings.batch_tokens, settings.row_length)

    @property
    def shard_tokens(self) -> int:
        settings = self.recipe.calibration
        return min(settings.rows_a_shard, self.num_rows) * settings.row_length

    @cached_property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.recipe.calibration.rows_a_shard)

    @cached_property
    def num_rows(self) -> int:
        """Rows that are calibrated on."""
        rows = self.text.calibration
        return max(1, len(rows) * self.calibration_tokens // self.tokens_of(rows))

    @cached_property
    def calibration_tokens(self) -> int:
        return self._at_most(self.recipe.calibration.max_tokens, self.text.calibration)

    @cached_property
    def held_out_tokens(self) -> int:
        return self._at_most(self.recipe.calibration.held_out_tokens, self.text.held_out)

    @property
    def sampled_tokens(self) -> int:
        """Tokens whose FFN inputs are kept, over all shards."""
        return min(self.calibration_tokens, self.recipe.calibration.sampled_tokens)

    def _at_most(self, limit: int | None, rows: Sequence[str]) -> int:
        """About how many tokens of some rows are read."""
        num_tokens = self.tokens_of(rows)
        if limit is None or self.checkpoint.kind not in ("encoder", "causal_lm"):
            return num_tokens
        return min(num_tokens, limit)

    def tokens_of(self, rows: Sequence[str]) -> int:
        """About how many tokens some rows have."""
        longest = self.recipe.calibration.row_length
        return sum(min(longest, len(row) // CHARACTERS_PER_TOKEN + 2) for row in rows)
