"""A run in numbers: how large the model and its parts are, and how much text goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ffsplit.calibration.mixture import OwnRows
from ffsplit.calibration.sampling import TextSample
from ffsplit.compressors.base import LayerWork
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.machine import bytes_below
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.recipes.recipe import Recipe
from ffsplit.run.checks import measures_widths
from ffsplit.splitting.knapsack import measured_widths
from ffsplit.splitting.solver import stored_layouts

CHARACTERS_PER_TOKEN = 4
"""A guess, for English text. A row is never longer than the recipe's row_length."""
EXPERTS_A_TOKEN = 8
"""Used if the config does not state it."""
INDEX_BYTES = 8
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


GPU_ROWS, CPU_ROWS = 2048, 32
GPU_CACHE_BYTES = 24 << 30
"""Upper limit on the keys and values of the rows that a GPU writes side by side."""


def rows_at_once(checkpoint: Checkpoint, *, device: str, row_length: int) -> int:
    """Rows of one shard at most. All are written side by side, in one pass of the model per token."""
    if device != "cuda":
        return CPU_ROWS
    config, item_bytes = checkpoint.text_config, 2
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or checkpoint.shapes[0].hidden_size // heads
    keys = (config.get("num_key_value_heads") or heads) * width
    of_row = 2 * keys * len(checkpoint.blocks) * row_length * item_bytes
    return max(1, min(GPU_ROWS, 1 << max(0, (GPU_CACHE_BYTES // of_row).bit_length() - 1)))


@dataclass(frozen=True)
class Workload:
    """What the estimates are made from. Elements are parameters.

    `itemsize` is bytes per element in the compute dtype. `text` is the sample. How many of its rows the
    recipe's token limits allow is a guess here.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    layouts: tuple[LayerLayout, ...]
    text: TextSample
    itemsize: int
    own: OwnRows
    is_one_process: bool = False

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
        """Elements of the largest block."""
        return max(self.elements_by_block)

    @property
    def outside_elements(self) -> int:
        """Elements of embeddings, heads and everything else outside the blocks."""
        return self.num_elements - sum(self.elements_by_block)

    @property
    def num_logits(self) -> int:
        """Logits per token if fidelity compares logits, else 0."""
        return self.checkpoint.vocab_size if self.checkpoint.compared_as in ("next_tokens", "target") else 0

    @property
    def num_blocks(self) -> int:
        return len(self.checkpoint.blocks)

    @property
    def num_ffns(self) -> int:
        return len(self.checkpoint.shapes)

    @cached_property
    def shape(self) -> FFNShape:
        """The shape of the largest FFN."""
        return max(self.checkpoint.shapes, key=lambda shape: shape.num_elements)

    @cached_property
    def kept(self) -> float:
        """The fraction of the FFNs' elements that is kept."""
        shapes = self.checkpoint.shapes
        elements = sum(layout.num_elements(shape) for layout, shape in zip(self.layouts, shapes, strict=True))
        return elements / sum(shape.num_elements for shape in shapes)

    @cached_property
    def kept_neurons(self) -> int:
        return max(layout.num_neurons for layout in self.layouts)

    @property
    def measures_widths(self) -> bool:
        """Whether a search, if there is one, measures tables of widths."""
        return measures_widths(self.checkpoint, self.layouts, self.recipe.steps)

    @property
    def table_widths(self) -> list[tuple[int, ...]]:
        """The widths of every FFN that tables measure."""
        multiple = self.recipe.width_multiple
        return [measured_widths(shape, kept=self.kept, multiple=multiple) for shape in self.checkpoint.shapes]

    @property
    def width_bytes(self) -> int:
        """Bytes of the down projections of all FFNs at all measured widths, and the numbers of neurons."""
        widths = (
            (shape, sum(widths[:-1]))
            for shape, widths in zip(self.checkpoint.shapes, self.table_widths, strict=True)
        )
        return sum(width * (shape.hidden_size * self.itemsize + INDEX_BYTES) for shape, width in widths)

    @property
    def of_layer(self) -> LayerWork:
        """The largest FFN, as work for a compressor."""
        return LayerWork(self.shape, self.kept_neurons, self.kept, self.sampled_tokens)

    @cached_property
    def compressed_bytes(self) -> int:
        """Bytes of the compressed checkpoint's weights, before the recipe's final quantization."""
        return self._bytes_with(self.layouts)

    @cached_property
    def artifact_bytes(self) -> int:
        """Bytes of the published weights. Attention counts in full, although it may be quantized too."""
        finish, multiple = self.recipe.after_healing, self.recipe.width_multiple
        stored = stored_layouts(self.layouts, self.checkpoint.shapes, finish=finish, multiple=multiple)
        return self._bytes_with(stored)

    def _bytes_with(self, layouts: Sequence[LayerLayout]) -> int:
        shapes, itemsize = self.checkpoint.shapes, self.checkpoint.itemsize
        ffns = sum(layout.size_bytes(shape, itemsize) for layout, shape in zip(layouts, shapes, strict=True))
        return self.file_bytes - sum(shape.num_elements for shape in shapes) * itemsize + ffns

    @property
    def layer_bytes(self) -> int:
        """Bytes of the compressed layers alone."""
        return self.compressed_bytes - (self.file_bytes - self.ffn_elements * self.checkpoint.itemsize)

    @cached_property
    def ffn_elements(self) -> int:
        return sum(shape.num_elements for shape in self.checkpoint.shapes)

    @property
    def other_block_elements(self) -> int:
        """Elements of the blocks without their FFNs: attention and norms."""
        return max(0, sum(self.elements_by_block) - self.ffn_elements)

    @property
    def trainable_elements(self) -> int:
        """What healing trains: the compressed model without its embeddings (here: the largest table)."""
        outside = self.checkpoint.names_in_blocks
        tables = [
            info.num_elements
            for name, info in self.checkpoint.tensors.items()
            if name not in outside and info.shape[:1] == (self.checkpoint.vocab_size,)
        ]
        kept = self.num_elements - round((1 - self.kept) * self.ffn_elements)
        return kept - max(tables, default=0)

    @cached_property
    def companion_bytes(self) -> int:
        """Bytes of the files that are copied along with the weights: tokenizers, code, other modules."""
        return self.checkpoint.folder.companion_bytes

    @cached_property
    def folder_bytes(self) -> int:
        """Bytes of every file in the model's folder."""
        return bytes_below(self.checkpoint.directory)

    @cached_property
    def num_units(self) -> int:
        """Modules whose inputs are sampled: each FFN, or all experts of a block together."""
        return len({ffn.unit for ffn in self.checkpoint.ffns})

    @property
    def experts_a_token(self) -> int:
        if not self.checkpoint.has_experts:
            return 0
        return int(self.checkpoint.text_config.get("num_experts_per_tok") or EXPERTS_A_TOKEN)

    @cached_property
    def healing_steps(self) -> int:
        """About how many steps there are if healing does not stop early."""
        settings = self.recipe.healing
        assert settings is not None, "only for recipes that heal"
        length = max(1, self.calibration_tokens // self.num_rows)
        rows = max(1, min(settings.batch_rows, settings.step_tokens // length))
        an_epoch = -(-self.num_rows // rows)
        return max(settings.epochs * an_epoch, settings.min_steps)

    @property
    def batch_tokens(self) -> int:
        settings = self.recipe.calibration
        return max(settings.tokens_per_batch, settings.row_length)

    @property
    def compared_tokens(self) -> int:
        """Tokens of a batch where outputs are compared."""
        settings = self.recipe.calibration
        return max(settings.compared_tokens, settings.row_length)

    @property
    def shard_tokens(self) -> int:
        settings = self.recipe.calibration
        return min(settings.rows_per_shard, self.num_rows) * settings.row_length

    @cached_property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.recipe.calibration.rows_per_shard)

    @cached_property
    def num_rows(self) -> int:
        """Rows used for calibration."""
        rows, own = self.text.calibration, self.own.calibration
        read = len(rows) * self._read_tokens // self.tokens_of(rows) if rows else 0
        return max(1, read + own)

    @cached_property
    def calibration_tokens(self) -> int:
        return self._read_tokens + self.own.calibration * self.recipe.calibration.row_length

    @property
    def _read_tokens(self) -> int:
        """Calibration tokens that the model does not write itself."""
        settings = self.recipe.calibration.beside(self.own.calibration)
        return self._at_most(settings.max_tokens, self.text.calibration)

    @property
    def own_tokens(self) -> int:
        """Tokens that the model writes itself."""
        return self.own.total * self.recipe.calibration.row_length

    @cached_property
    def validation_tokens(self) -> int:
        """Tokens that candidates are compared on."""
        own = self.own.validation * self.recipe.calibration.row_length
        return self.tokens_of(self.text.validation) + own

    @cached_property
    def held_out_tokens(self) -> int:
        settings = self.recipe.calibration
        own = self.own.held_out * settings.row_length
        return self._at_most(settings.held_out_tokens, self.text.held_out) + own

    @property
    def sampled_tokens(self) -> int:
        """Tokens whose FFN inputs are kept, over all shards."""
        return min(self.calibration_tokens, self.recipe.calibration.sampled_tokens)

    def _at_most(self, limit: int | None, rows: Sequence[str]) -> int:
        """About how many tokens of the rows are read."""
        num_tokens = self.tokens_of(rows)
        if limit is None or not self.checkpoint.reads_single_texts:
            return num_tokens
        return min(num_tokens, limit)

    def tokens_of(self, rows: Sequence[str]) -> int:
        """About how many tokens the rows have."""
        longest = self.recipe.calibration.row_length
        return sum(min(longest, len(row) // CHARACTERS_PER_TOKEN + 2) for row in rows)
