"""The records that say where a model family keeps its feed-forward networks.

A row is a family; it has towers (an encoder, a decoder, a text and a vision model: one list of blocks
each), and a tower says which FFNs its blocks may have. What a checkpoint really has is found by its
tensors: a row may name a decoder, a gate or experts that some models of the family lack.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ffsplit.config import Record

ModelKind = Literal["encoder", "causal_lm", "seq2seq", "speech", "image", "image_text", "audio"]
"""What a model reads, and which of its outputs are compared."""
TEXT_KINDS: tuple[ModelKind, ...] = ("encoder", "causal_lm", "seq2seq")


class FFNPaths(Record):
    """One FFN of a block. Paths are below the block.

    Where the whole FFN is one module, `module` names it. Where it is spread over a block, `module` is
    None, and a split FFN takes the place of `up` while `activation` and `down` become identities.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = Field(default=False, description="`up` holds the rows of the gate, then its own")
    transposed: bool = Field(default=False, description="weights are [in, out]: transformers' Conv1D")
    experts: bool = Field(default=False, description="one FFN for each `*` in the paths; `module` runs all")
    module: str | None = None
    activation: str | None = None
    output_norm: str | None = Field(default=None, description="the layer norm of x + FFN(x), if there is one")
    width_field: str | None = Field(default="intermediate_size", description="None: no config can state it")
    label: str = Field(default="", description="told apart from a block's other FFNs by this")

    @property
    def split_path(self) -> str:
        """The module, below a block, whose place a split FFN takes."""
        return self.module if self.module is not None else self.up

    @property
    def guard(self) -> str:
        """The original tensor, below `split_path`, that a split FFN stores with a shape that cannot match."""
        if self.experts:
            return "down_proj"
        path = self.down if self.module is not None else self.up
        return f"{path}.weight".removeprefix(f"{self.split_path}.")


class Tower(Record):
    """One list of blocks (`blocks` ends in `.*`), or a single block, below the base model."""

    blocks: str
    ffns: tuple[FFNPaths, ...]
    name: str = ""
    config: str | None = Field(default=None, description="the part of config.json that is about it")
    layers_field: str = "num_hidden_layers"
    activation_field: str | None = "hidden_act"
    default_activation: str = "gelu"
    norm_eps: float = 1e-12
    mask: str | None = Field(
        default="attention_mask", description="what tells tokens from padding; None: all"
    )

    @property
    def is_list(self) -> bool:
        return self.blocks.endswith(".*")

    @property
    def path(self) -> str:
        """The list of blocks, or the single block."""
        return self.blocks.removesuffix(".*")


class Architecture(Record):
    """One model family, by the `model_type` of its config.json."""

    model_type: str
    kind: ModelKind
    towers: tuple[Tower, ...]
    file_names: tuple[tuple[str, str], ...] = Field(
        default=(), description="what files call parts of a module's path, replaced in this order"
    )
    position_offset: int = Field(default=0, description="positions reserved before the first token")
    positions_field: str = "max_position_embeddings"

    @property
    def can_heal(self) -> bool:
        """Whether a model can be trained to give its original's outputs: it must read one row of text."""
        experts = any(ffn.experts for tower in self.towers for ffn in tower.ffns)
        return self.kind in ("encoder", "causal_lm") and not experts

    @property
    def can_stream(self) -> bool:
        """Whether a model can be held one block at a time: it has one list of blocks, and reads text."""
        return len(self.towers) == 1 and all(tower.is_list and tower.mask for tower in self.towers)
